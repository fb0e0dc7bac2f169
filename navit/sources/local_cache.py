"""A folder on this machine that keeps what was read behind URLs.

All processes of a machine may share it. An entry is one file, named by a hash of its
key. Its writer makes it as `parts/NAME` and locks that file, so another that needs the
entry waits for it, and the part of a killed process is known by its free lock. The file
`total` has the bytes of all entries; its lock guards the making of room.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from navit import config
from navit.sources.cache import digest

log = logging.getLogger("navit")

# Bytes of the checksum that ends an entry of `read`.
_CHECK = 4

# A full cache frees this share of itself at once, as finding the oldest lists it all.
_FREED = 0.05


class LocalCache:
    """Keeps up to `limit` bytes in `folder`, and deletes the oldest entries.

    If the folder cannot be used, as on a full disk, one warning says so, and nothing
    more is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit, self._works = folder, limit, True

    def read(self, key: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """An entry of `size` bytes, which `fetch` reads if it is not there.

        An answer of another size is returned, but not kept.
        """
        with contextlib.ExitStack() as stack:
            part = None
            try:
                found = self._found(key)
                if found is None and self._works and size + _CHECK <= self._limit:
                    part = stack.enter_context(self._part(key))
                    found = self._found(key)  # another may have made it meanwhile
            except OSError as error:
                self._stop(error)
                found = None
            if found is not None:
                return found
            data = fetch()
            if part is not None and len(data) == size:
                try:
                    self._reserve(part, size + _CHECK)
                    part.write(data)
                    part.write(_check(data))
                    self._keep(key, part)
                except OSError as error:
                    self._stop(error)
            return data

    def file(self, key: str, size: int, write: Callable[[BinaryIO], None]) -> Path:
        """An entry as a file of `size` bytes, which `write` writes if it is not there.

        Open it at once: it may be deleted, which does not matter to an open file.

        Raises:
          ValueError: if it is larger than the cache.
          OSError: if it cannot be written.
        """
        path = self._path(key)
        if size > self._limit:
            raise ValueError(
                f"a file of {size / 2**30:.2f} GiB does not fit into data.cache_gib="
                f"{self._limit / 2**30:g}: raise it"
            )
        if not path.exists():
            with self._part(key) as part:
                if not path.exists():
                    self._reserve(part, size)
                    write(part)
                    self._keep(key, part, sync=True)
        return path

    def _path(self, key: str) -> Path:
        name = digest([key])
        return self.folder / name[:2] / name[2:]

    def _part_path(self, key: str) -> Path:
        return self.folder / "parts" / digest([key])

    def _found(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        data = content[:-_CHECK]
        if content[-_CHECK:] == _check(data):
            return data
        path.unlink(missing_ok=True)  # damaged, as by a loss of power
        return None

    @contextlib.contextmanager
    def _part(self, key: str) -> Iterator[BinaryIO]:
        """The locked file to write an entry to; it is deleted unless it was kept."""
        path = self._part_path(key)
        with _locked(path) as file:
            file.truncate(0)
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()

    def _reserve(self, part: BinaryIO, size: int) -> None:
        """Makes room for a part, and gives it its size."""
        with _locked(self.folder / "total") as file:
            text = file.read().strip()
            total = int(text) if text.isdigit() else self._free(self._limit)
            if total + size > self._limit:
                total = self._free(self._limit - size)
            part.truncate(size)
            file.seek(0)
            file.write(f"{total + size:<20}".encode())
            file.truncate()

    def _keep(self, key: str, part: BinaryIO, *, sync: bool = False) -> None:
        part.flush()
        if sync:
            os.fsync(part.fileno())
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        os.replace(self._part_path(key), path)

    def _free(self, limit: int) -> int:
        """Deletes the oldest entries if all are above a limit; returns their bytes."""
        total = 0
        for path in (self.folder / "parts").iterdir():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if _try_lock(file):  # its writer was killed, or has just finished
                    if _is_at(file, path):
                        path.unlink()
                else:
                    total += path.stat().st_size
        entries = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total += sum(size for _, size, _ in entries)
        if total > limit:
            for _, size, path in sorted(entries):
                if total <= limit - _FREED * self._limit:
                    break
                path.unlink(missing_ok=True)
                total -= size
        return total

    def _stop(self, error: OSError) -> None:
        if self._works:
            log.warning("data.cache=%s keeps nothing more: %s", self.folder, error)
        self._works = False


def open_cache(data: config.DataConfig) -> LocalCache | None:
    """The cache of a config, if it has one."""
    if data.cache is None:
        return None
    return LocalCache(Path(data.cache).expanduser(), int(data.cache_gib * 2**30))


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECK, "big")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A file, made if necessary, that nobody else has locked. Waits for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with open(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # not moved or deleted while this waited
                yield file
                return


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
