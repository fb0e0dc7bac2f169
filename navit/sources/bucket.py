"""Files below a URL of an object store: gs://, s3:// and others that fsspec opens.

Folders are made only behind file://. Object stores have none, and some would make a
bucket instead.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from navit.sources.transient import Retries

# Files that are sent or fetched at a time.
_THREADS = 16
# Seconds between tries.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)

T = TypeVar("T")


def is_url(path: object) -> bool:
    """Whether a path is a URL; a `Path` never is one, since it drops a slash."""
    return isinstance(path, str) and "://" in path


def check_writable(url: str) -> None:
    """Raises ValueError for a web server, where nothing can be written."""
    if re.match("https?://", url):
        raise ValueError(
            f"{url}: nothing can be written behind http: name a folder, or the URL of "
            "a bucket (gs://, s3://)"
        )


def connect(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and what the URL names there.

    Raises:
      ValueError: if fsspec, the protocol or the protocol's own package is missing.
    """
    try:
        import fsspec
    except ImportError:
        raise ValueError(
            f"{url!r} is opened by fsspec, which is not installed: pip install fsspec, "
            "and gcsfs for gs://, s3fs for s3:// or aiohttp for https://"
        ) from None
    options = {"auto_mkdir": True} if url.startswith("file:") else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # or the protocol's own package
        raise ValueError(f"{url!r} cannot be opened: {error}") from None


class Bucket:
    """The files below a URL. A request that fails for the moment is tried again."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, root = connect(self.url)
        self._root, self._retried = root.rstrip("/"), Retries(*_WAITS)

    def names(self, folder: str = "") -> list[str]:
        """The files below a folder, named from the root; none if it is not there."""
        self._fs.invalidate_cache()  # of listings
        path = f"{self._root}/{folder}".rstrip("/")
        found = self._tried(lambda: self._fs.find(path))
        names = (name[len(self._root) + 1 :] for name in found)
        return sorted(name for name in names if name and name[-1] != "/")

    def read(self, name: str, stop: int | None = None) -> bytes | None:
        """The contents of a file, up to the byte `stop`; None if it is not there."""
        path, part = f"{self._root}/{name}", {} if stop is None else {"end": stop}
        try:
            return self._tried(lambda: self._fs.cat_file(path, **part))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file; others see the old one or the new one."""
        path = f"{self._root}/{name}"
        self._tried(lambda: self._fs.pipe_file(path, data))

    def send(self, folder: Path, names: Iterable[str], below: str = "") -> None:
        """Copies files of a local folder to the same names below `below`."""
        prefix = f"{self._root}/{below}".rstrip("/")

        def one(name: str) -> None:
            local, path = str(folder / name), f"{prefix}/{name}"
            self._tried(lambda: self._fs.put_file(local, path))

        _each(one, names)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copies files into a local folder.

        Raises:
          ValueError: if a name leads out of the folder.
        """

        def one(name: str) -> None:
            local = folder / name
            if not local.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{self.url} has a file {name!r}: delete it")
            local.parent.mkdir(parents=True, exist_ok=True)
            self.fetch_file(name, local)

        _each(one, names)

    def fetch_file(self, name: str, to: Path) -> None:
        """Copies a file to a path whose folder exists."""
        self._tried(lambda: self._fs.get_file(f"{self._root}/{name}", str(to)))

    def move(self, before: str, after: str) -> None:
        """Moves a folder, file by file; an object store does so by itself."""

        def one(name: str) -> None:
            source, path = self._root + "/" + name, after + name[len(before) :]
            self._tried(lambda: self._fs.cp_file(source, f"{self._root}/{path}"))

        _each(one, self.names(before))
        self.remove(before)

    def remove(self, name: str) -> None:
        """Deletes a file or a folder, if it is there."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self._fs.rm(f"{self._root}/{name}", recursive=True))

    def _tried(self, ask: Callable[[], T]) -> T:
        """Asks; raises an OSError of one line, or FileNotFoundError."""
        try:
            return self._retried(ask)
        except Exception as error:  # each file system has errors of its own
            reason = str(error).partition("\n")[0] or type(error).__name__
            missing = isinstance(error, FileNotFoundError)
            kind = FileNotFoundError if missing else OSError
            raise kind(f"{self.url}: {reason}") from error


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(do, names):
            pass
