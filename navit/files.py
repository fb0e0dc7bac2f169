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
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`, a file or a directory.

    It is moved there when all is written. If that fails or is interrupted, it is
    removed, and what was at `path` stays; a directory there is filled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_folder = path.is_dir()  # perhaps a mount or a link, which nothing can replace
    where = path if is_folder else path.parent
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=where) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if not is_folder:
            os.replace(temporary, path)
            return
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)
