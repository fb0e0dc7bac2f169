"""Writing files so that a reader never finds half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a whole file, or leaves what was there; makes the folder if need be."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Where to write what is to be `path`, a file or with `folder` a directory.

    It is moved there when all is written. If that fails or is interrupted, it is
    removed, and what was at `path` stays; a directory there is filled.

    Raises:
      IsADirectoryError: if a directory stands where a file is to be.
    """
    if path.is_dir() and not folder:
        raise IsADirectoryError(
            f"{path} is a directory, and a file is to be written there: name a file in "
            "it, or another"
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
