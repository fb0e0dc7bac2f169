"""Saves what one run learns about a dataset, for the next run.

The files are in `.navit` beside the data, or in `$XDG_CACHE_HOME/navit` (`~/.cache`) if
the data is remote or read-only.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.files import cache_home, write_atomic

log = logging.getLogger("navit")

_VERSION = "1"

# What numpy and zipfile raise for a damaged file: a flipped bit can ask for a password
# or an unknown compression (NotImplementedError is a RuntimeError).
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


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


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of anything with a faithful `str`; order matters."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(f"{part}\0".encode(errors="surrogateescape"))
    return checksum.hexdigest()


def write_arrays(place: Place, kind: str, **arrays: np.ndarray) -> Path | None:
    """Saves arrays of a dataset, all or nothing; returns the path as `write_beside`."""
    file = io.BytesIO()
    stamp = np.array(f"{_VERSION} {place.fingerprint}")
    np.savez(file, stamp=stamp, **arrays)  # type: ignore[arg-type]
    return write_beside(place, kind, ".npz", file.getvalue())


def read_arrays(place: Place, kind: str) -> dict[str, Any] | None:
    """What `write_arrays` saved; None if there is nothing or the data has changed."""
    for folder in _folders(place):
        path = folder / _file_name(place, kind, ".npz")
        try:
            with path.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
        except FileNotFoundError:
            continue
        except _DAMAGED as error:
            log.warning("%s cannot be read (%s): it is built again", path, error)
            continue
        if str(arrays.pop("stamp", "")) == f"{_VERSION} {place.fingerprint}":
            return arrays
        log.info("the data has changed since %s was made: it is built again", path)
    return None


def write_beside(place: Place, kind: str, suffix: str, data: bytes) -> Path | None:
    """Writes a file beside the data, else in the cache folder; None if neither works.

    In that case, logs a warning.
    """
    for folder in _folders(place):
        path = folder / _file_name(place, kind, suffix)
        try:
            write_atomic(path, data)
            return path
        except OSError as error:
            reason = error
    log.warning("the index cannot be saved: %s", reason)
    return None


def find_beside(place: Place, kind: str, suffix: str) -> Path | None:
    """The file that `write_beside` wrote, if there is one."""
    paths = (folder / _file_name(place, kind, suffix) for folder in _folders(place))
    return next((path for path in paths if path.is_file()), None)


def _folders(place: Place) -> list[Path]:
    beside = [] if place.folder is None else [place.folder / ".navit"]
    return [*beside, cache_home()]


def _file_name(place: Place, kind: str, suffix: str) -> str:
    return f"{kind}-{digest([place.identity])[:12]}{suffix}"
