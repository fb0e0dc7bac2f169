"""Hugging Face directories: `Siglip2Model` (NaFlex), `SiglipModel` (one resolution)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from navit.config import ModelConfig
from navit.convert import tensors, tokenizers
from navit.convert.huggingface_config import (
    check_expressible,
    check_preprocessor,
    config_of,
    member,
    model_of,
    preprocessor_of,
    read_json,
    write_json,
)
from navit.convert.stored import (
    Tensor,
    Weights,
    check_shapes,
    is_buffer,
    layers_of,
    shapes_of,
    to_ours,
    to_theirs,
)
from navit.files import replacing, write_atomic

# The types that a checkpoint may have; each converts to float32 exactly.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": None}
_SHARD_BYTES = 2 * 2**30


def is_huggingface(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and _any_tensors(path)


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
    stored = {n: _shape(file, n) for n, file in file_of.items() if not is_buffer(n)}
    model = model_of(path, config, stored)
    check_preprocessor(path, model)
    table = tensors.huggingface(conv=model.vision.fixed_grid)
    shapes = shapes_of(model)
    _check(path, table, model, shapes, stored)
    by_name: dict[str, Tensor] = {t.ours: t for t in table}

    def get(ours: str) -> np.ndarray:
        t = by_name[ours]
        layers = layers_of(model, ours)
        shape = shapes[ours]
        if layers is None:
            return _part(_load(file_of, t.theirs), t, shape)
        out = np.empty(shape, np.float32)
        for i in range(layers):
            out[i] = _part(_load(file_of, t.theirs.format(i)), t, shape[1:])
        return out

    return Weights(model, get, str(path), tokenizers.found_in(path))


def write(weights: Weights, out: Path) -> None:
    """Writes a directory that `from_pretrained` opens, with its processor.

    Raises:
      ValueError: names a setting that transformers' classes lack.
    """
    model = weights.model
    check_expressible(model)
    with replacing(out, folder=True) as temporary:
        temporary.mkdir()
        _write_tokenizer(weights, temporary)
        write_json(temporary / "config.json", config_of(model))
        write_json(temporary / "preprocessor_config.json", preprocessor_of(model))
        _write_tensors(weights, temporary)


def _write_tensors(weights: Weights, out: Path) -> None:
    table = tensors.huggingface(conv=weights.model.vision.fixed_grid)
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        file = out / f"shard-{len(shards)}"
        try:
            safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from None
        shards.append(list(shard))
        shard, size = {}, 0

    for name, value in _tensors(weights, table, shapes_of(weights.model)):
        if shard and size + value.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = np.ascontiguousarray(value)
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    index: dict[str, str] = {}
    mode = (out / "config.json").stat().st_mode  # safetensors restricts it
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        (out / f"shard-{i}").chmod(mode)
        os.replace(out / f"shard-{i}", out / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _tensors(
    weights: Weights, table: list[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every stored tensor, with one of ours in memory at a time."""
    model = weights.model
    parts: dict[str, dict[int, np.ndarray]] = {}
    for t in table:
        value = weights.read(t.ours)
        if t.part[1] > 1:
            shape = _stored_shape(t, shapes[t.ours])
            one = (shape[0] // t.part[1], *shape[1:])
            parts.setdefault(t.theirs, {})[t.part[0]] = to_theirs(value, t.axes, one)
            continue
        for i, name, shape in _stored(model, t, shapes[t.ours]):
            yield name, to_theirs(value if i is None else value[i], t.axes, shape)
    for name, pieces in parts.items():
        yield name, np.concatenate([pieces[i] for i in sorted(pieces)])


def _stored(
    model: ModelConfig, t: Tensor, shape: tuple[int, ...]
) -> list[tuple[int | None, str, tuple[int, ...]]]:
    """What one of our tensors is stored as: (layer or None, name, shape)."""
    layers = layers_of(model, t.ours)
    if layers is None:
        return [(None, t.theirs, _stored_shape(t, shape))]
    one = _stored_shape(t, shape[1:])
    return [(i, t.theirs.format(i), one) for i in range(layers)]


def _stored_shape(t: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of one of our tensors, or of one layer of it."""
    if t.axes == "conv":
        side = math.isqrt(shape[0] // 3)
        return (shape[1], 3, side, side)
    stored = {
        "scale": (1,),
        "bias": (1,),
        "vision.head.probe": (1, *shape),
        "vision.position.table": (shape[0] * shape[0], shape[-1]) if shape else (),
    }.get(t.ours, shape[::-1] if t.axes == "transpose" else shape)
    return (stored[0] * t.part[1], *stored[1:])


def _part(value: np.ndarray, t: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    index, count = t.part
    size = len(value) // count
    return to_ours(value[index * size : (index + 1) * size], t.axes, shape)


def _check(
    path: Path,
    table: list[Tensor],
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
) -> None:
    expected = {}
    for t in table:
        for _, name, shape in _stored(model, t, shapes[t.ours]):
            expected[name] = shape
    check_shapes(path, expected, stored)


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


def _load(file_of: dict[str, Path], name: str) -> np.ndarray:
    with _open(file_of[name]) as opened:
        return opened.get_tensor(name).astype(np.float32)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file: {error}"
        ) from None


def _any_tensors(path: Path) -> bool:
    return any(path.glob("*.safetensors"))
