"""Hugging Face directories: `Siglip2Model` (NaFlex), `SiglipModel` (one resolution)."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

from navit.convert import codec, shards, tensors, tokenizers
from navit.convert.huggingface_config import (
    check_preprocessor,
    config_of,
    model_of,
    preprocessor_of,
    read_json,
    write_json,
)
from navit.convert.stored import Weights, check_expressible
from navit.files import replacing, write_atomic


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def read(path: Path) -> Weights:
    """Opens a directory; sizes come from its tensors, only heads from config.json.

    Raises:
      ValueError: names a tensor or setting that is missing, surplus, not supported, or
        of another shape or type.
    """
    file_of = shards.locate(path)
    config = read_json(path / "config.json")
    if config.get("model_type") not in ("siglip", "siglip2"):
        raise ValueError(
            f"{path} has no image tower that navit knows (docs/weights.md lists "
            f"them): {path / 'config.json'} says "
            f"{config.get('model_type') or config.get('architecture')!r}, and the "
            f"tensors are {_some(file_of)}"
        )
    file_of = {
        name: file
        for name, file in file_of.items()
        if not name.endswith(".position_ids")  # a buffer that older transformers saved
    }
    stored = shards.shapes(path, file_of)
    model = model_of(path, config, stored)
    check_preprocessor(path, model)
    table = tensors.huggingface(model)
    codec.check(path, table, model, stored)
    get = codec.reader(table, model, lambda name: shards.load(file_of[name], name))
    return Weights(model, get, str(path), tokenizers.found_in(path))


def write(weights: Weights, out: Path) -> None:
    """Writes a directory that `from_pretrained` opens, with its processor.

    Raises:
      ValueError: names a setting that transformers' classes lack.
    """
    model = weights.model
    check_expressible(model, "transformers' Siglip2Model")
    with replacing(out, folder=True) as temporary:
        temporary.mkdir()
        _write_tokenizer(weights, temporary)
        write_json(temporary / "config.json", config_of(model))
        write_json(temporary / "preprocessor_config.json", preprocessor_of(model))
        table = tensors.huggingface(model)
        shapes = codec.stored_shapes(table, model)
        shards.write(temporary, shapes, codec.encoded(table, weights))


def _write_tokenizer(weights: Weights, out: Path) -> None:
    for name, data in tokenizers.contents(weights).items():
        write_atomic(out / name, data)
    if about := tokenizers.config(weights):
        write_atomic(out / "tokenizer_config.json", about)


def _some(names: Collection[str]) -> str:
    """`"3 tensors, such as a, b"`."""
    return f"{len(names)} tensors, such as {', '.join(itertools.islice(names, 2))}"
