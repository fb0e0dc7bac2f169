"""Files of arrays that are mapped into memory, so that large ones open at once.

A file is one line of JSON, with its checksum, and then the bytes of each array.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.files import replacing

# Arrays begin at multiples of this many bytes.
_ALIGNED = 64
# Bytes of the first line that are left for the facts.
_FACTS = 1024


class Stored(NamedTuple):
    """Arrays of a dataset, and a few facts, which JSON can hold.

    Attributes:
      path: the file; None if they are in memory only.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    path: Path | None = None


Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class Mapped(np.ndarray):
    """An array in a file, of which only the pages that are used are read.

    Pickles as the name of its file, and what is derived from it as other arrays do.
    """

    _where: tuple[Path, str, str] | None = None  # (file, stamp, name of the array)

    def __reduce_ex__(self, protocol):  # type: ignore[no-untyped-def]
        if self._where is None:
            return np.array(self, subok=False).__reduce_ex__(protocol)
        return _again, self._where


def create_arrays(
    path: Path,
    stamp: str,
    shapes: Shapes,
    fill: Callable[[dict[str, np.ndarray]], dict[str, Any]],
    *,
    sparse: bool = False,
) -> Stored | OSError:
    """Writes a file, all or nothing; returns the error if there is no place for it.

    Args:
      stamp: what `open_arrays` must be given.
      fill, sparse: as in `navit.sources.cache.write_arrays`.
    """
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(replacing(path))
            file = stack.enter_context(temporary.open("w+b"))
            start, offsets, size = _layout(shapes)
            file.truncate(size)
            # Writing to a mapped file on a full disk would end the process.
            if not sparse and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            memory = stack.enter_context(mmap.mmap(file.fileno(), size))
        except OSError as error:
            return error
        facts = fill(_arrays(memory, shapes, offsets))
        memory.flush()
        line = _line(stamp, shapes, facts)
        if len(line) > start:
            raise ValueError(f"the facts of {path} have {len(line)} bytes: {facts}")
        file.seek(0)
        file.write(line[:-1].ljust(start - 1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return open_arrays(path, stamp)


class OtherData(ValueError):
    """The file has another stamp."""


def open_arrays(path: Path, stamp: str, *, mapped: bool = True) -> Stored:
    """Maps a file into memory, or reads it.

    Raises:
      ValueError: if it is damaged, or of other data (`OtherData`).
    """
    with path.open("rb") as file:
        line = file.readline(1 << 20)
        checksum, _, text = line.strip().partition(b" ")
        if checksum != _checksum(text):
            raise ValueError("its first line is damaged")
        header = json.loads(text)
        if header["stamp"] != stamp:
            raise OtherData(f"{path} is of other data")
        shapes = {
            name: (np.dtype(dtype), tuple(shape))
            for name, (dtype, shape) in header["arrays"].items()
        }
        offsets, size = _offsets(len(line), shapes)
        if size != (found := os.fstat(file.fileno()).st_size):
            raise ValueError(f"it has {found} bytes, not {size}")
        if not mapped:
            file.seek(0)
            return Stored(_arrays(file.read(), shapes, offsets), header["facts"], path)
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # chunks of records are read, not their neighbours
        memory.madvise(mmap.MADV_RANDOM)
    arrays = _arrays(memory, shapes, offsets)
    for name, array in arrays.items():
        array._where = path, stamp, name  # type: ignore[attr-defined]
    return Stored(arrays, header["facts"], path)


def _again(path: Path, stamp: str, name: str) -> np.ndarray:
    try:
        return open_arrays(path, stamp).arrays[name]
    except OtherData:
        raise ValueError(f"{path} has been built again: start the run again") from None


def _arrays(
    memory: mmap.mmap | bytes, shapes: Shapes, offsets: dict[str, int]
) -> dict[str, np.ndarray]:
    return {
        name: Mapped(shape, dtype, memory, offsets[name])
        for name, (dtype, shape) in shapes.items()
    }


def _line(stamp: str, shapes: Shapes, facts: dict[str, Any]) -> bytes:
    arrays = {name: [dtype.str, shape] for name, (dtype, shape) in shapes.items()}
    header = {"stamp": stamp, "arrays": arrays, "facts": facts}
    text = json.dumps(header).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _layout(shapes: Shapes) -> tuple[int, dict[str, int], int]:
    """(where the arrays begin, the offset of each, the size of the file)."""
    start = _aligned(len(_line("0" * 80, shapes, {})) + _FACTS)
    return start, *_offsets(start, shapes)


def _offsets(start: int, shapes: Shapes) -> tuple[dict[str, int], int]:
    offsets = {}
    for name, (dtype, shape) in shapes.items():
        if dtype.kind not in "iuS" or min(shape) < 0:
            raise ValueError(f"its array {name} has type {dtype} and shape {shape}")
        offsets[name] = start
        start = _aligned(start + dtype.itemsize * math.prod(shape))
    return offsets, start


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
