"""Saves what one run learns about a dataset, for the next run.

The files are in `.navit` beside the data, or in `$XDG_CACHE_HOME/navit` (`~/.cache`) if
the data is remote or read-only. A file of arrays is one line of JSON and then the bytes
of each array, so that it is opened by mapping it into memory, however large it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.files import cache_home, replacing, write_atomic

log = logging.getLogger("navit")

_VERSION = "2"

# Arrays begin at multiples of this many bytes.
_ALIGNED = 64
# Bytes of the first line that are left for the facts.
_FACTS = 1024


class Place(NamedTuple):
    """Where an index is saved and which dataset it belongs to.

    Attributes:
      folder: the data's own folder; None if that is not on this machine.
      identity: the dataset and how it is read; names the files.
      fingerprint: changes when the data does (names, byte sizes, modification times).
    """

    folder: Path | None
    identity: str
    fingerprint: str


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
        return _reopened, self._where


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of anything with a faithful `str`; order matters."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(f"{part}\0".encode(errors="surrogateescape"))
    return checksum.hexdigest()


def write_arrays(
    place: Place,
    kind: str,
    shapes: Shapes,
    fill: Callable[[dict[str, np.ndarray]], dict[str, Any]],
    *,
    part: int | None = None,
    keep: bool = True,
    sparse: bool = False,
) -> Stored:
    """Saves arrays of a dataset, all or nothing.

    Args:
      fill: writes the arrays, which are in a file and may be larger than memory, and
        returns the facts.
      part: the number of this part of the arrays; None for the whole.
      keep: if false, the arrays are in memory only, as they are if no folder can be
        written to, which is logged.
      sparse: do not reserve space for what `fill` leaves out. A disk that is full while
        it writes would then end the process.
    """
    name, reason = _file_name(place, kind, part), None
    for folder in _folders(place) if keep else ():
        with contextlib.ExitStack() as stack:
            try:
                path = folder / name
                temporary = stack.enter_context(replacing(path))
                file = stack.enter_context(temporary.open("w+b"))
                start, offsets, size = _layout(shapes)
                file.truncate(size)
                if not sparse and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                reason = error
                continue
            with mmap.mmap(file.fileno(), size) as memory:
                facts = fill(_arrays(memory, shapes, offsets))
                memory.flush()
            line = _line(_stamp(place), shapes, facts)
            if len(line) > start:
                raise ValueError(f"the facts of {path} have {len(line)} bytes: {facts}")
            file.seek(0)
            file.write(line[:-1].ljust(start - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return _opened(path, _stamp(place))
    if reason is not None:
        log.warning("the index cannot be saved: %s", reason)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
    return Stored(arrays, fill(arrays))


def read_arrays(place: Place, kind: str, *, part: int | None = None) -> Stored | None:
    """What `write_arrays` saved; None if there is nothing or the data has changed.

    Logs that of a whole; a part of other data is only not read.
    """
    for folder in _folders(place):
        path = folder / _file_name(place, kind, part)
        old = path.with_suffix(".npz")
        if not path.exists() and old.exists():
            log.info("%s is of an earlier version of navit: it is built again", old)
            continue
        try:
            return _opened(path, _stamp(place), mapped=part is None)
        except FileNotFoundError:
            continue
        except _OtherData:
            if part is None:
                log.info("the data has changed since %s was made: built again", path)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): it is built again", path, error)
    return None


def remove_parts(place: Place, kind: str) -> None:
    """Removes the parts of what is now whole, and what an earlier version saved."""
    for folder in _folders(place):
        whole = folder / _file_name(place, kind)
        shutil.rmtree(whole.with_suffix(".parts"), ignore_errors=True)
        for old in (kind, "tar"):
            with contextlib.suppress(OSError):
                (folder / _file_name(place, old)).with_suffix(".npz").unlink()


def write_beside(place: Place, kind: str, suffix: str, data: bytes) -> Path | None:
    """Writes a file beside the data, else in the cache folder; None if neither works.

    In that case, logs a warning.
    """
    for folder in _folders(place):
        path = (folder / _file_name(place, kind)).with_suffix(suffix)
        try:
            write_atomic(path, data)
            return path
        except OSError as error:
            reason = error
    log.warning("the index cannot be saved: %s", reason)
    return None


def find_beside(place: Place, kind: str, suffix: str) -> Path | None:
    """The file that `write_beside` wrote, if there is one."""
    name = _file_name(place, kind)
    paths = ((folder / name).with_suffix(suffix) for folder in _folders(place))
    return next((path for path in paths if path.is_file()), None)


class _OtherData(ValueError):
    """The file is of another version of the data."""


def _opened(path: Path, stamp: str, *, mapped: bool = True) -> Stored:
    """Maps a file into memory, or reads it.

    Raises:
      ValueError: if it is damaged, or of other data (`_OtherData`).
    """
    with path.open("rb") as file:
        line = file.readline(1 << 20)
        checksum, _, text = line.strip().partition(b" ")
        if checksum != _checksum(text):
            raise ValueError("its first line is damaged")
        header = json.loads(text)
        if header["stamp"] != stamp:
            raise _OtherData(f"{path} is of other data")
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


def _reopened(path: Path, stamp: str, name: str) -> np.ndarray:
    try:
        return _opened(path, stamp).arrays[name]
    except _OtherData:
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


def _stamp(place: Place) -> str:
    return f"{_VERSION} {digest([place.fingerprint])}"


def folder_of(place: Place) -> Path:
    """The folder that is tried first."""
    return _folders(place)[0]


def _folders(place: Place) -> list[Path]:
    beside = [] if place.folder is None else [place.folder / ".navit"]
    return [*beside, cache_home()]


def _file_name(place: Place, kind: str, part: int | None = None) -> str:
    name = f"{kind}-{digest([place.identity])[:12]}"
    return f"{name}.arrays" if part is None else f"{name}.parts/{part:07}.arrays"
