"""SHA-256 checksums of a folder's files, in the format of `sha256sum --check`."""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Iterable
from pathlib import Path

from navit.files import write_atomic

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """Writes the checksums of every file in `folder`."""
    write_atomic(folder / NAME, lines(of(folder)))


def of(folder: Path) -> dict[str, str]:
    """The checksum of every file in `folder`, by name."""
    return _sums(folder, _files(folder))


def lines(sums: dict[str, str]) -> bytes:
    """Checksums as a file has them; the inverse of `parsed`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()


def parsed(text: str) -> dict[str, str]:
    """Checksums by name, from the text of a file."""
    pairs = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in pairs}


def damage(folder: Path, parts: Iterable[str] | None = None) -> str | None:
    """The first damage: a missing, added or changed file; None if there is none.

    Args:
      parts: the subfolders to verify, besides the files beside them; None verifies all.
    """
    if not (folder / NAME).is_file():
        return f"{NAME} is missing"
    sums = parsed((folder / NAME).read_text(errors="replace"))
    if not sums:
        return f"{NAME} is empty"
    kept = None if parts is None else set(parts)

    def counts(name: str) -> bool:
        return kept is None or "/" not in name or name.partition("/")[0] in kept

    files = [name for name in _files(folder) if counts(name)]
    expected = {name: digest for name, digest in sums.items() if counts(name)}
    for name in expected:
        if name not in files:
            return f"{name} is missing"
    for name in files:
        if name not in expected:
            return f"{name} is not in {NAME}"
    actual = _sums(folder, files)
    changed = [name for name in expected if actual[name] != expected[name]]
    return f"{changed[0]} has changed since it was written" if changed else None


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    # File managers and NFS leave hidden files anywhere; one name is zarr's.
    return sorted(
        name
        for name in names
        if name != NAME and (name.endswith("/.zarray") or Path(name).name[0] != ".")
    )


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
