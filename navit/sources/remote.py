"""Reads bytes of files behind a URL, through fsspec."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeVar

from navit.sources.bucket import connect
from navit.sources.local_cache import LocalCache
from navit.sources.transient import Retries, is_transient

# Seconds between tries, and without a success.
_WAITS = (0.1, 0.5, 2.0, 4.0)
_PATIENCE = 60.0
# An answer that takes longer than `_PATIENCE` and is slower than this, in bytes a
# second, has failed.
_SLOWEST = 1 << 18
# A whole file is read in pieces of this size.
_PIECE = 1 << 25

T = TypeVar("T")


class Stat(NamedTuple):
    """A file's size in bytes, and what changes with its content (mtime, ETag)."""

    size: int
    version: str


class NoRanges(OSError):
    """A server that sends whole files when asked for a part of one."""


class Remote:
    """Files behind a URL.

    Threads that read at the same time have one request each in flight. A request that
    fails with a transient error is tried again a few times; then a ConnectionError is
    raised.
    """

    block = 1 << 22

    def __init__(self, url: str, cache: LocalCache | None = None) -> None:
        self._fs, self._cache = connect(url)[0], cache
        self._tried = Retries(*_WAITS, patience=_PATIENCE)
        self._versions: dict[str, Stat] = {}  # of what is in the cache

    def read_range(
        self, path: str, start: int, size: int, *, keep: bool = False
    ) -> bytes:
        def fetch() -> bytes:
            return self._retried(path, lambda: self._read(path, start, size))

        if not keep or self._cache is None:
            return fetch()
        return self._cache.read(f"{self._key(path)} {start} {size}", size, fetch)

    def local_file(self, path: str) -> str:
        """A copy in the cache, which is to be opened at once.

        Raises:
          ValueError: if there is no cache, or the file is larger.
        """
        if self._cache is None:
            raise ValueError(
                f"{path} must be copied to this machine to be read: set data.cache to "
                "a folder for copies, or mount the bucket (gcsfuse, mount-s3) and name "
                "its folder"
            )
        key = self._key(path)
        size = self._versions[path].size

        def write(file: BinaryIO) -> None:
            for start in range(0, size, _PIECE):
                wanted = min(_PIECE, size - start)
                data = self.read_range(path, start, wanted)
                if len(data) < wanted:
                    raise OSError(f"{path} ends after {start + len(data)} bytes")
                file.write(data)

        return str(self._cache.file(key, size, write))

    def _key(self, path: str) -> str:
        """A file's name and version, in the cache."""
        if path not in self._versions:
            self._versions[path] = self.stat(path)
        return f"{path} {self._versions[path]}"

    def stat(self, path: str) -> Stat:
        stat = _stat_of(self._retried(path, lambda: self._fs.info(path)))
        if self._cache is not None:
            self._versions[path] = stat
        return stat

    def listing(self, folder: str) -> dict[str, Stat] | None:
        """All files below, by relative path: asking one by one would take hours."""
        root = self._fs._strip_protocol(folder).rstrip("/")
        infos = self._retried(folder, lambda: self._fs.find(root, detail=True))
        stats = {  # a web server's list of files has no sizes
            path[len(root) + 1 :]: (
                self.stat(path) if info.get("size") is None else _stat_of(info)
            )
            for path, info in sorted(infos.items())
        }
        if self._cache is not None:
            base = folder.rstrip("/")
            self._versions |= {f"{base}/{name}": s for name, s in stats.items()}
        return stats

    def glob(self, pattern: str) -> list[str]:
        paths = self._retried(pattern, lambda: self._fs.glob(pattern))
        return sorted(self._fs.unstrip_protocol(path) for path in paths)

    def _read(self, path: str, start: int, size: int) -> bytes:
        """One request; a TimeoutError ends one that hangs, if the client can."""
        fs, part = self._fs, {"start": start, "end": start + size}
        if fs.async_impl:
            from fsspec.asyn import sync

            timeout = _PATIENCE + size / _SLOWEST
            data = sync(fs.loop, fs._cat_file, path, timeout=timeout, **part)
        else:
            data = fs.cat_file(path, **part)
        if len(data) > size:
            raise NoRanges(
                f"{path}: {size} bytes from {start} were asked for, and {len(data)} "
                "came: this server cannot send a part of a file, so copy the files to "
                "one that can, or to this machine"
            )
        return data

    def _retried(self, path: str, ask: Callable[[], T]) -> T:
        try:
            return self._tried(ask)
        except Exception as error:  # each file system has errors of its own
            if is_transient(error):
                reason = str(error.__cause__ or error) or type(error).__name__
                raise ConnectionError(f"{path}: {reason}") from None
            if isinstance(error, FileNotFoundError | NoRanges | ValueError):
                raise
            reason = str(error) or type(error).__name__
            raise OSError(f"{path}: {reason}") from None


def _stat_of(info: dict) -> Stat:
    keys = ("ETag", "etag", "md5Hash", "mtime", "updated", "LastModified", "created")
    version = next((str(info[key]) for key in keys if info.get(key)), "")
    return Stat(int(info["size"] or 0), version)
