"""Hugging Face directories: `Siglip2Model` (NaFlex), `SiglipModel` (one resolution)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from navit.convert import codec, tensors, tokenizers
from navit.convert.huggingface_config import (
    check_preprocessor,
    config_of,
    member,
    model_of,
    preprocessor_of,
    read_json,
    write_json,
)
from navit.convert.stored import Weights, check_expressible
from navit.files import replacing, write_atomic

# The types that a checkpoint may have; each converts to float32 exactly.
_DTYPES = ("F32", "F16", "BF16")
_SHARD_BYTES = 2 * 2**30


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def read(path: Path) -> Weights:
    """Opens a directory; sizes come from its tensors, only heads from config.json.

    Raises:
      ValueError: names a tensor or setting that is missing, surplus, not supported, or
        of another shape or type.
    """
    file_of = _locate(path)
    config = read_json(path / "config.json")
    if config.get("model_type") not in ("siglip", "siglip2"):
        raise ValueError(
            f"{path / 'config.json'} has model_type={config.get('model_type')!r}, but "
            "navit reads 'siglip2' and 'siglip'"
        )
    stored = {
        name: _shape(file, name)
        for name, file in file_of.items()
        if not name.endswith(".position_ids")  # a buffer that older transformers saved
    }
    model = model_of(path, config, stored)
    check_preprocessor(path, model)
    table = tensors.huggingface(model)
    codec.check(path, table, model, stored)
    get = codec.reader(table, model, lambda name: _load(file_of[name], name))
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
        _write_tensors(weights, temporary)


def _write_tensors(weights: Weights, out: Path) -> None:
    table = tensors.huggingface(weights.model)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in codec.stored_shapes(table, weights.model).items():
        nbytes = 4 * math.prod(shape)  # float32
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    stored = codec.encoded(table, weights)
    mode = (out / "config.json").stat().st_mode  # safetensors restricts it
    file_of: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        shard = dict(itertools.islice(stored, len(names)))
        try:
            safetensors.numpy.save_file(shard, out / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {out / file}: {error}") from None
        (out / file).chmod(mode)
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": file_of},
        )


def _write_tokenizer(weights: Weights, out: Path) -> None:
    for name, data in tokenizers.contents(weights).items():
        write_atomic(out / name, data)
    if about := tokenizers.config(weights):
        write_atomic(out / "tokenizer_config.json", about)


def _locate(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from a single file or from several with an index."""
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        names = member(index, read_json(index), "weight_map", dict, "an object")
        listed = sorted({member(index, names, x, str, "a file's name") for x in names})
        if not listed:
            raise ValueError(f"{index}: weight_map is empty, but should name the files")
        for name in listed:
            if Path(name).name != name or not (path / name).is_file():
                raise ValueError(f"{index} names {name!r}, which is not in {path}")
        files = [path / name for name in listed]
    file_of: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            file_of |= dict.fromkeys(opened.keys(), file)
    return file_of


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with _open(file) as opened:
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{file}: {name} is {tensor.get_dtype()}, but weights must be "
                f"{', '.join(_DTYPES)}"
            )
        return tuple(tensor.get_shape())


def _load(file: Path, name: str) -> np.ndarray:
    with _open(file) as opened:
        return opened.get_tensor(name).astype(np.float32, copy=False)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file: {error}"
        ) from None
