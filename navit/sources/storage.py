"""Reads bytes of files by path: local ones with `os.pread`, URLs by `Remote`."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from navit.sources.bucket import is_url
from navit.sources.local_cache import LocalCache
from navit.sources.missing import check_missing
from navit.sources.remote import Remote, Stat
from navit.sources.transient import is_transient

# At most this many files are open: there may be more shards than a process may open.
_OPEN_FILES = 256

# Files whose sizes are asked for at the same time.
_ASKED_AT_ONCE = 32

_T = TypeVar("_T")
_Read = Callable[[int, int], bytes]  # (start, size) -> bytes of a file


@runtime_checkable
class Storage(Protocol):
    """Files by path. Thread-safe; pickles without open files."""

    block: int  # bytes worth fetching at a time

    def read_range(
        self, path: str, start: int, size: int, *, keep: bool = False
    ) -> bytes:
        """Bytes of a file; `keep`: they are worth a place in the local cache."""
        ...

    def local_file(self, path: str) -> str:
        """The path of a copy on this machine, to be opened at once."""
        ...

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

    def read_range(
        self, path: str, start: int, size: int, *, keep: bool = False
    ) -> bytes:
        del keep  # it is here already
        # This reference keeps the descriptor open if the cache evicts it meanwhile.
        descriptor = self._open(path)
        return os.pread(descriptor.number, size, start)

    def local_file(self, path: str) -> str:
        return path

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


def open_storage(path: str, cache: LocalCache | None = None) -> Storage:
    """The storage that reads `path`.

    Args:
      cache: keeps what is read behind a URL.
    """
    return Remote(path, cache) if is_url(path) else Local()


def find(
    storage: Storage, path: str, suffixes: tuple[str, ...], *, missing: float = 0.0
) -> dict[str, Stat]:
    """The files that `a-{000..127}.tar`, `{a,b}.tar`, a glob or a folder stands for.

    Behind a URL, each may be a request, so a progress bar appears if that takes long.

    Args:
      missing: the share of them that may be missing; those are left out and named.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: if more are missing.
    """
    if not path:
        raise FileNotFoundError(
            "the source has no path: set data.train.path (or data.eval.path)"
        )
    if not is_url(path):
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
    stats = _asked(functools.partial(_stat_or_none, storage), files)
    there = {f: s for f, s in zip(files, stats, strict=True) if s is not None}
    if not there:
        raise FileNotFoundError(f"there is no file {files[0]}")
    absent = sorted({*files} - {*there})
    check_missing(absent, len(files), missing, f"files of {path}", "add them")
    return there


def stats_of(storage: Storage, files: Sequence[str]) -> list[Stat]:
    """`storage.stat` of all files: behind a URL, each may be a request."""
    return _asked(storage.stat, files)


def _asked(ask: Callable[[str], _T], files: Sequence[str]) -> list[_T]:
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        answers = pool.map(ask, files)
        return [*tqdm(answers, "sizes of files", len(files), unit=" files", delay=2)]


def _stat_or_none(storage: Storage, file: str) -> Stat | None:
    """None if there is no such file."""
    try:
        return storage.stat(file)
    except FileNotFoundError as error:
        if is_transient(error):  # HTTP's, if the server fails
            raise
        return None


def open_file(path: str) -> BinaryIO:
    """Opens a file on this machine.

    Raises:
      OSError: also for a named pipe, where a read would wait for a writer.
    """
    return open(path, "rb", opener=_open_regular)


def opened(read: _Read, size: int, block: int = 1 << 16) -> BinaryIO:
    """A file that reads no more than it is asked for, in blocks."""
    return io.BufferedReader(_Range(read, read, size), block)


def unbuffered(read: _Read, size: int) -> io.RawIOBase:
    """A file that reads exactly what it is asked for."""
    return _Range(read, read, size)


def open_image(
    storage: Storage, path: str, start: int, size: int, block: int
) -> BinaryIO:
    """An image in a file, as `opened`; only if it is read as a whole is it kept."""

    def read(at: int, count: int) -> bytes:
        return storage.read_range(path, start + at, count)

    def read_all(at: int, count: int) -> bytes:
        return storage.read_range(path, start + at, count, keep=at == 0)

    return io.BufferedReader(_Range(read, read_all, size), block)


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

    def __init__(self, read: _Read, read_all: _Read, size: int) -> None:
        self._read, self._read_all, self._size, self._at = read, read_all, size, 0

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
        data = self._read_all(self._at, wanted) if wanted > 0 else b""
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
