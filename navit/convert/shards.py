"""The tensors of a Hugging Face directory: one safetensors file, or several."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from navit.convert.huggingface_config import member, read_json, write_json

# The types that a checkpoint may have; each converts to float32 exactly.
_DTYPES = ("F32", "F16", "BF16")
_SHARD_BYTES = 2 * 2**30
_INDEX = "model.safetensors.index.json"


def locate(path: Path) -> dict[str, Path]:
    """Tensor name -> file, for every tensor in the directory's files."""
    files = sorted(path.glob("*.safetensors"))
    if (path / _INDEX).is_file():
        files = sorted(set(_indexed(path).values()))
        for file in files:
            if not file.is_file():
                raise _lost(path, file)
    return _contents(files)


def listed(path: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index has it; no file that it names is opened.

    A user of a language model's image tower may have only the files with the tower.
    """
    if (path / _INDEX).is_file():
        return _indexed(path)
    return _contents(sorted(path.glob("*.safetensors")))


def shapes(path: Path, file_of: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of these tensors, from the headers of their files.

    Raises:
      ValueError: names a file or tensor that is missing or of another type.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(file_of):
        if not file.is_file():
            raise _lost(path, file)
        with _open(file) as opened:
            stored = set(opened.keys())
            for name in names:
                if name not in stored:
                    raise ValueError(f"{path} lacks the tensor {name}: {file} has none")
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: {name} is {tensor.get_dtype()}, but weights must be "
                        f"{', '.join(_DTYPES)}"
                    )
                found[name] = tuple(tensor.get_shape())
    return {name: found[name] for name in file_of}


def load(file: Path, name: str) -> np.ndarray:
    """One tensor as float32; no other is read."""
    with _open(file) as opened:
        return opened.get_tensor(name).astype(np.float32, copy=False)


def write(
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes tensors in order, in several files with an index if they are large.

    Args:
      shapes: the names and shapes of all that `stored` yields.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)  # float32
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
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
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        write_json(out / _INDEX, index)


def _indexed(path: Path) -> dict[str, Path]:
    index = path / _INDEX
    names = member(index, read_json(index), "weight_map", dict, "an object")
    file_of = {x: member(index, names, x, str, "a file's name") for x in names}
    if not file_of:
        raise ValueError(f"{index}: weight_map is empty, but should name the files")
    for file in sorted(set(file_of.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is not in {path}")
    return {name: path / file for name, file in file_of.items()}


def _lost(path: Path, file: Path) -> ValueError:
    return ValueError(f"{path / _INDEX} names {file.name!r}, which is not in {path}")


def _contents(files: Iterable[Path]) -> dict[str, Path]:
    file_of: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            file_of |= dict.fromkeys(opened.keys(), file)
    return file_of


def _by_file(file_of: Mapping[str, Path]) -> list[tuple[Path, list[str]]]:
    names: dict[Path, list[str]] = {}
    for name, file in file_of.items():
        names.setdefault(file, []).append(name)
    return list(names.items())


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file: {error}"
        ) from None
