"""Writes files so that no reader sees a partial one; names the cache folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one; makes its folder if necessary."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write a file to, or with `folder` a directory.

    On success it is moved to `path`; into a directory that is there, its files are
    moved. On an error or an interruption it is removed, and `path` stays as it was.

    Raises:
      IsADirectoryError: if `path` is a directory and should be a file.
    """
    if path.is_dir() and not folder:
        raise IsADirectoryError(
            f"{path} is a directory, and a file is written there: name a file in it, "
            "or another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    is_folder = path.is_dir()  # perhaps a mount or a link, which nothing can replace
    where = path if is_folder else path.parent
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=where) as made:
        temporary = Path(made) / path.name
        yield temporary
        if not is_folder:
            os.replace(temporary, path)
            return
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/navit`, or `~/.cache/navit`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "navit"
