"""What is found out about a dataset once and kept for the next run.

The files lie in `.navit` beside the data, or in `$XDG_CACHE_HOME/navit` (`~/.cache`)
where the data is remote or cannot be written to.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.files import write_atomic

log = logging.getLogger("navit")

_VERSION = "1"

# What numpy and zipfile raise for a damaged file: a flipped bit can ask for a password
# or an unknown compression (NotImplementedError is a RuntimeError).
_DAMAGED = (
    *(OSError, ValueError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


class Place(NamedTuple):
    """Where an index is kept and what it belongs to.

    Attributes:
      folder: the data's own folder; None where that is not on this machine.
      identity: which dataset, and read how; names the files.
      fingerprint: changes when the data does (names, byte sizes, times of change).
    """

    folder: Path | None
    identity: str
    fingerprint: str


def digest(parts: Iterable[object]) -> str:
    """Of anything with a faithful `str`; the order counts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


def write_arrays(place: Place, kind: str, **arrays: np.ndarray) -> Path | None:
    """Keeps arrays of a dataset, whole or not at all."""
    file = io.BytesIO()
    stamp = np.array(f"{_VERSION} {place.fingerprint}")
    np.savez(file, stamp=stamp, **arrays)  # type: ignore[arg-type]
    return write_beside(place, kind, ".npz", file.getvalue())


def read_arrays(place: Place, kind: str) -> dict[str, Any] | None:
    """What `write_arrays` kept; None if it is not there or the data has changed."""
    for folder in _folders(place):
        path = folder / _file_name(place, kind, ".npz")
        try:
            with path.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
        except FileNotFoundError:
            continue
        except _DAMAGED as error:
            log.warning("%s cannot be read (%s): it is made anew", path, error)
            continue
        if str(arrays.pop("stamp", "")) == f"{_VERSION} {place.fingerprint}":
            return arrays
        log.info("the data has changed since %s was made: it is made anew", path)
    return None


def write_beside(place: Place, kind: str, suffix: str, data: bytes) -> Path | None:
    """Writes a file beside the data, or in the cache folder, or says that it cannot."""
    for folder in _folders(place):
        path = folder / _file_name(place, kind, suffix)
        try:
            write_atomic(path, data)
            return path
        except OSError as error:
            reason = error
    log.warning("the index cannot be kept: %s", reason)
    return None


def find_beside(place: Place, kind: str, suffix: str) -> Path | None:
    """Where `write_beside` wrote it."""
    paths = (folder / _file_name(place, kind, suffix) for folder in _folders(place))
    return next((path for path in paths if path.is_file()), None)


def _folders(place: Place) -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    beside = [] if place.folder is None else [place.folder / ".navit"]
    return [*beside, Path(cache) / "navit"]


def _file_name(place: Place, kind: str, suffix: str) -> str:
    return f"{kind}-{digest([place.identity])[:12]}{suffix}"
