"""Files below a URL of an object store: gs://, s3:// and others that fsspec opens.

Folders are never made, but for file://: object stores have none, and may make a bucket.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from navit.sources.transient import is_transient

# Files that are sent or fetched at a time.
_THREADS = 16
# Seconds between tries; each wait is drawn from 0.5 to 1.5 times these.
_WAITS = (0.5, 1, 2, 4, 8)

T = TypeVar("T")


def is_url(path: object) -> bool:
    """Whether a path is a URL; a `Path` never is one, since it drops a slash."""
    return isinstance(path, str) and "://" in path


class Bucket:
    """The files below a URL. A request that fails for the moment is tried again."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._fs: Any
            options = {"auto_mkdir": True} if url.startswith("file:") else {}
            self._fs, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:  # or the protocol's own package
            raise ValueError(
                f"{url} cannot be opened ({error}): pip install fsspec, and gcsfs for "
                "gs:// or s3fs for s3://"
            ) from None
        self._root = root.rstrip("/")

    def names(self, folder: str = "") -> list[str]:
        """The files below a folder, named from the root; none if it is not there."""
        self._fs.invalidate_cache()  # of listings
        path = f"{self._root}/{folder}".rstrip("/")
        found = self._tried(lambda: self._fs.find(path))
        names = (name[len(self._root) + 1 :] for name in found)
        return sorted(name for name in names if name and name[-1] != "/")

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if it is not there."""
        try:
            return self._tried(lambda: self._fs.cat_file(f"{self._root}/{name}"))
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
            self._tried(lambda: self._fs.get_file(f"{self._root}/{name}", str(local)))

        _each(one, names)

    def move(self, before: str, after: str) -> None:
        """Moves a folder, file by file."""
        for name in self.names(before):
            data = self.read(name)
            assert data is not None
            self.write(after + name[len(before) :], data)
        self.remove(before)

    def remove(self, name: str) -> None:
        """Deletes a file or a folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self._fs.rm(f"{self._root}/{name}", recursive=True))

    def _tried(self, ask: Callable[[], T]) -> T:
        for wait in _WAITS:
            try:
                return ask()
            except Exception as error:  # each file system has errors of its own
                if not is_transient(error):
                    raise self._plain(error) from error
            time.sleep(wait * random.uniform(0.5, 1.5))
        try:
            return ask()
        except Exception as error:
            raise self._plain(error) from error

    def _plain(self, error: Exception) -> OSError:
        """An OSError of one line; `FileNotFoundError` stays one."""
        if isinstance(error, FileNotFoundError):
            return error
        reason = str(error).partition("\n")[0] or type(error).__name__
        return OSError(f"{self.url}: {reason}")


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(do, names):
            pass
