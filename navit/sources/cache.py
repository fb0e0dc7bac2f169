"""Saves what one run learns about a dataset, for the next run.

The files are in `.navit` beside the data, or in `$XDG_CACHE_HOME/navit` (`~/.cache`) if
the data is remote or read-only. An index of remote data may be published beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.files import cache_home, write_atomic
from navit.sources import mirror
from navit.sources.mapped import OtherData, Shapes, Stored, create_arrays, open_arrays

log = logging.getLogger("navit")

_VERSION = "2"

# Parts that are copied at the same time.
_FETCHED_AT_ONCE = 32


class Place(NamedTuple):
    """Where an index is saved and which dataset it belongs to.

    Attributes:
      folder: the data's own folder, a URL if it is not on this machine; None if there
        is none.
      identity: the dataset and how it is read; names the files.
      fingerprint: changes when the data does (names, byte sizes, modification times).
    """

    folder: Path | str | None
    identity: str
    fingerprint: str


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
    reason = None
    for folder in _folders(place) if keep else ():
        path = folder / _file_name(place, kind, part)
        stored = create_arrays(path, _stamp(place), shapes, fill, sparse=sparse)
        if isinstance(stored, Stored):
            return stored
        reason = stored
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
            return open_arrays(path, _stamp(place), mapped=part is None)
        except FileNotFoundError:
            continue
        except OtherData:
            if part is None:
                log.info("the data has changed since %s was made: built again", path)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): it is built again", path, error)
    if part is None and _fetched(place, _file_name(place, kind)):
        return open_arrays(cache_home() / _file_name(place, kind), _stamp(place))
    return None


def publish(place: Place, stored: Stored) -> bool:
    """Copies a file beside remote data; whether other hosts can read it there."""
    if stored.path is None or not stored.path.is_relative_to(cache_home()):
        return False
    name = stored.path.relative_to(cache_home())
    return mirror.put(place.folder, cache_home(), str(name))


def fetch_parts(place: Place, kind: str, wanted: Collection[int]) -> None:
    """Copies parts that other hosts have published, if all that are wanted are there.

    Those that are here need not be there.
    """
    names = {n: _file_name(place, kind, n) for n in wanted}
    absent = [n for n in wanted if not _is_here(place, names[n])]
    if absent and {*absent} <= mirror.numbers(place.folder, _parts(place, kind)):
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            list(pool.map(lambda n: _fetched(place, names[n]), absent))


def _is_here(place: Place, name: str) -> bool:
    return any((folder / name).exists() for folder in _folders(place))


def _fetched(place: Place, name: str) -> bool:
    def is_of_this_data(head: bytes) -> bool:
        return f'"{_stamp(place)}"'.encode() in head

    return mirror.get(place.folder, name, cache_home() / name, is_of_this_data)


def remove_parts(place: Place, kind: str, numbers: Iterable[int]) -> None:
    """Removes these parts, here and beside remote data."""
    names = [_file_name(place, kind, number) for number in numbers]
    for folder in _folders(place):
        for name in names:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    saved = mirror.numbers(place.folder, _parts(place, kind))
    for number in saved.intersection(numbers):
        mirror.remove(place.folder, _file_name(place, kind, number))


def remove_all_parts(place: Place, kind: str) -> None:
    """Removes the parts of what is now whole, and what an earlier version saved."""
    for folder in _folders(place):
        shutil.rmtree(folder / _parts(place, kind), ignore_errors=True)
        for old in (kind, "tar"):
            with contextlib.suppress(OSError):
                (folder / _file_name(place, old)).with_suffix(".npz").unlink()
    mirror.remove(place.folder, _parts(place, kind))


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


def _stamp(place: Place) -> str:
    return f"{_VERSION} {digest([place.fingerprint])}"


def shared(place: Place) -> str:
    """Says where processes must find one another's parts."""
    here = f"{_folders(place)[0]} must be one folder for all"
    return here if mirror.is_none(place.folder) else f"in {place.folder}/.navit"


def _folders(place: Place) -> list[Path]:
    beside = [place.folder / ".navit"] if isinstance(place.folder, Path) else []
    return [*beside, cache_home()]


def _file_name(place: Place, kind: str, part: int | None = None) -> str:
    if part is not None:
        return f"{_parts(place, kind)}/{part:07}.arrays"
    return f"{kind}-{digest([place.identity])[:12]}.arrays"


def _parts(place: Place, kind: str) -> str:
    return f"{kind}-{digest([place.identity])[:12]}.parts"
