"""Reads bytes of files by path: local ones with `os.pread`, URLs through fsspec."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, runtime_checkable

from navit.sources.missing import check_missing
from navit.sources.transient import http_status, is_transient

# At most this many files are open: there may be more shards than a process may open.
_OPEN_FILES = 256

# Files whose sizes are asked for at the same time.
_ASKED_AT_ONCE = 32

# Seconds between tries; each wait is drawn from 0.5 to 1.5 times these.
_WAITS = (0.5, 1, 2, 4)
# After this many seconds without a success, nothing is tried again.
_PATIENCE = 60

T = TypeVar("T")


class Stat(NamedTuple):
    """A file's size in bytes, and what changes with its content (mtime, ETag)."""

    size: int
    version: str


@runtime_checkable
class Storage(Protocol):
    """Files by path. Thread-safe; pickles without open files."""

    block: int  # bytes worth fetching at a time

    def read_range(self, path: str, start: int, size: int) -> bytes: ...
    def stat(self, path: str) -> Stat: ...
    def listing(self, folder: str) -> dict[str, Stat] | None: ...
    def glob(self, pattern: str) -> list[str]: ...


class Local:
    """Files on this machine."""

    block = 1 << 16

    def __init__(self) -> None:
        self._open = functools.lru_cache(_OPEN_FILES)(_Descriptor)

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        del state
        self.__init__()  # type: ignore[misc]

    def read_range(self, path: str, start: int, size: int) -> bytes:
        # This reference keeps the descriptor open if the cache evicts it meanwhile.
        descriptor = self._open(path)
        return os.pread(descriptor.number, size, start)

    def stat(self, path: str) -> Stat:
        status = os.stat(path)
        return Stat(status.st_size, str(status.st_mtime_ns))

    def listing(self, folder: str) -> dict[str, Stat] | None:
        """None: asking for one file is cheap here, while listing all may not be."""
        del folder
        return None

    def glob(self, pattern: str) -> list[str]:
        anchor = Path(pattern).anchor
        parts = Path(anchor or ".").glob(str(Path(pattern).relative_to(anchor)))
        return sorted(str(p) for p in parts if not p.is_dir())


class Remote:
    """Files behind a URL.

    A request that fails with a transient error is tried again a few times; then a
    ConnectionError is raised.
    """

    block = 1 << 22

    def __init__(self, url: str) -> None:
        self._fs = _filesystem(url)
        self._failing_since: float | None = None

    def read_range(self, path: str, start: int, size: int) -> bytes:
        end = start + size
        return self._retried(
            path, lambda: self._fs.cat_file(path, start=start, end=end)
        )

    def stat(self, path: str) -> Stat:
        return _remote_stat(self._retried(path, lambda: self._fs.info(path)))

    def listing(self, folder: str) -> dict[str, Stat] | None:
        """All files below, by relative path: asking one by one would take hours."""
        root = self._fs._strip_protocol(folder).rstrip("/")
        infos = self._retried(folder, lambda: self._fs.find(root, detail=True))
        return {  # a web server's list of files has no sizes
            path[len(root) + 1 :]: (
                self.stat(path) if info.get("size") is None else _remote_stat(info)
            )
            for path, info in sorted(infos.items())
        }

    def glob(self, pattern: str) -> list[str]:
        paths = self._retried(pattern, lambda: self._fs.glob(pattern))
        return sorted(self._fs.unstrip_protocol(path) for path in paths)

    def _retried(self, path: str, ask: Callable[[], T]) -> T:
        for wait in (*_WAITS, None):
            try:
                answer = ask()
            except Exception as error:  # each file system has errors of its own
                if not is_transient(error):
                    if http_status(error) is None:
                        raise
                    raise OSError(f"{path}: {error}") from None
                now = time.monotonic()
                self._failing_since = self._failing_since or now
                if wait is None or now - self._failing_since > _PATIENCE:
                    reason = str(error.__cause__ or error) or type(error).__name__
                    raise ConnectionError(f"{path}: {reason}") from None
            else:
                self._failing_since = None
                return answer
            time.sleep(wait * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def is_remote(path: str) -> bool:
    return "://" in path


def open_storage(path: str) -> Storage:
    """The storage that reads `path`."""
    return Remote(path) if is_remote(path) else Local()


def find(
    storage: Storage, path: str, suffixes: tuple[str, ...], *, missing: float = 0.0
) -> list[str]:
    """The files that `a-{000..127}.tar`, `{a,b}.tar`, a glob or a folder stands for.

    Args:
      missing: the share of them that may be missing; those are left out and named.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: if more are missing.
    """
    if not path:
        raise FileNotFoundError("the source has no path: set data.train.path")
    if not is_remote(path):
        path = str(Path(path).expanduser())
    files: list[str] = []
    for plain in [path] if os.path.isfile(path) else _braces(path):
        if os.path.isfile(plain):  # even if its name has wildcards
            files.append(plain)
        elif os.path.isdir(plain):
            for suffix in suffixes:
                files += storage.glob(f"{glob.escape(plain.rstrip('/'))}/*{suffix}")
        elif any(char in plain for char in "*?["):
            files += storage.glob(plain)
        elif plain.endswith(suffixes):
            files.append(plain)
        else:
            pattern = [f"{plain.rstrip('/')}/*{suffix}" for suffix in suffixes]
            files += [file for p in pattern for file in storage.glob(p)]
    files = list(dict.fromkeys(files))  # patterns may overlap
    if not files:
        raise FileNotFoundError(f"no {' or '.join(suffixes)} file matches {path!r}")
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = list(pool.map(functools.partial(_is_there, storage), files))
    there = [file for file, there in zip(files, found, strict=True) if there]
    if not there:
        raise FileNotFoundError(f"there is no file {files[0]}")
    absent = sorted({*files} - {*there})
    check_missing(absent, len(files), missing, f"files of {path}", "add them")
    return there


def stats_of(storage: Storage, files: Sequence[str]) -> list[Stat]:
    """`storage.stat` of all files: behind a URL, each may be a request."""
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(storage.stat, files))


def _is_there(storage: Storage, file: str) -> bool:
    try:
        storage.stat(file)
        return True
    except OSError as error:
        if is_transient(error):
            raise
        return False


def open_file(path: str) -> BinaryIO:
    """Opens a file on this machine.

    Raises:
      OSError: also for a named pipe, where a read would wait for a writer.
    """
    return open(path, "rb", opener=_open_regular)


def opened(
    read: Callable[[int, int], bytes], size: int, block: int = 1 << 16
) -> BinaryIO:
    """A file that reads no more than it is asked for, in blocks."""
    return io.BufferedReader(_Range(read, size), block)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # does not wait at a pipe
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is not a regular file")


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = _open_regular(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):  # opened; at exit `os` may be gone, so `close`
            close(self.number)


class _Range(io.RawIOBase):
    mode, name = "rb", "a range of bytes"  # required by BinaryIO

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
        self._at = max(0, base[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._read(self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:  # in one request, unlike RawIOBase's
        wanted = self._size - self._at
        data = self._read(self._at, wanted) if wanted > 0 else b""
        self._at += len(data)
        if self._at < self._size:
            raise ValueError(f"it ends after {self._at} of {self._size} bytes")
        return data


def _braces(path: str) -> Iterable[str]:
    """Expands `{00..12}` and `{a,b}`, as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", path)
    choices = []
    for i, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        if span:
            first, last = span.groups()
            if int(last) < int(first):
                raise ValueError(f"{path!r}: {{{part}}} counts down")
            numbers = range(int(first), int(last) + 1)
            choices.append([f"{n:0{len(first)}d}" for n in numbers])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return map("".join, itertools.product(*choices))


def _filesystem(url: str) -> Any:
    try:
        import fsspec
    except ImportError:
        raise ValueError(
            f"{url!r} is read through fsspec, which is not installed: pip install "
            "fsspec, and its package for this protocol (gcsfs, s3fs)"
        ) from None
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:  # the protocol's own package
        raise ValueError(f"{url!r} cannot be opened: {error}") from None


def _remote_stat(info: dict) -> Stat:
    keys = ("ETag", "etag", "md5Hash", "mtime", "updated", "LastModified", "created")
    version = next((str(info[key]) for key in keys if info.get(key)), "")
    return Stat(int(info["size"] or 0), version)
