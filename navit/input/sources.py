"""Where images and captions come from: random access, sizes known before any decode."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from navit import config
from navit.input import pixels

log = logging.getLogger("navit")

# Column names as other trainers' tables have them (transformers, open_clip).
_FILE = ("file", "file_name", "filepath")
_CAPTION = ("caption", "text", "title")


class Task(NamedTuple):
    """A classification: a prompt-ready name per class, a class per image (-1: none)."""

    class_names: tuple[str, ...]
    labels: np.ndarray


@runtime_checkable
class Source(Protocol):
    """Random access to images, their captions and their sizes."""

    sizes: np.ndarray  # [len, 2] int32 (height, width), upright
    tasks: dict[str, Task]  # the first one labels the training batch

    def __len__(self) -> int: ...
    def image(self, index: int) -> pixels.ImageLike: ...
    def captions(self, index: int) -> tuple[str, ...]: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...  # another one where the data is another


class _Entry(NamedTuple):
    file: str
    captions: tuple[str, ...]
    label: str | None


class FolderSource:
    """Photographs in a folder, with a CSV or JSONL table of `file,caption[,label]`.

    A file may stand in several rows, one caption each. Sizes are read from the headers
    here, once. A file that cannot be read is left out, with a warning that names it.

    Raises:
      FileNotFoundError, ValueError: a folder, table or image that is not there, a table
        without the columns, a path that leaves the folder, or nothing left to read.
    """

    def __init__(self, folder: config.Folder) -> None:
        self.path = Path(folder.path).expanduser()
        if not folder.path or not self.path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder.path!r}: set data.train.path (or "
                "data.eval.path) to the folder with your images"
            )
        table = _find_table(self.path, folder.table)
        try:
            entries = _read_table(table)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{table} cannot be read: {error}") from None
        # Classes are those of the whole table, so that every split numbers them alike.
        names = sorted({entry.label for entry in entries if entry.label})
        for entry in entries:
            _check_inside(self.path, entry.file, table)
        if folder.split != "all":
            entries = [
                e
                for e in entries
                if (_hash(e.file) < folder.holdout) == (folder.split == "eval")
            ]
            if not entries:
                raise ValueError(
                    f"no image of {table} falls in split={folder.split!r} with "
                    f"holdout={folder.holdout}: change the holdout or use split='all'"
                )
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(self._size, entries))
        kept = [i for i, size in enumerate(sizes) if size is not None]
        if not kept:
            raise ValueError(
                f"not one of the {len(sizes)} files of {table} is readable"
            )
        self._entries = [entries[i] for i in kept]
        self.sizes = np.array([sizes[i] for i in kept], np.int32)
        self.tasks = {}
        if names:
            ids = [names.index(e.label) if e.label else -1 for e in self._entries]
            self.tasks["label"] = Task(tuple(names), np.array(ids, np.int32))

    def __len__(self) -> int:
        return len(self._entries)

    def image(self, index: int) -> bytes:
        return (self.path / self._entries[index].file).read_bytes()

    def captions(self, index: int) -> tuple[str, ...]:
        return self._entries[index].captions

    def name(self, index: int) -> str:
        return str(self.path / self._entries[index].file)

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes, order, captions and labels."""
        rows = [
            [*entry, *map(int, size)]
            for entry, size in zip(self._entries, self.sizes, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return f"{len(rows)} images (table and sizes {digest[:16]})"

    def _size(self, entry: _Entry) -> tuple[int, int] | None:
        file = self.path / entry.file
        try:
            with file.open("rb") as opened:
                return pixels.size_of(opened)
        except (ValueError, OSError) as error:
            log.warning("left out, unreadable: %s (%s)", file, error)
            return None


def _find_table(path: Path, name: str) -> Path:
    if name:
        if not (path / name).is_file():
            raise FileNotFoundError(f"there is no table {path / name}")
        return path / name
    found = sorted(p for p in path.iterdir() if p.suffix in (".csv", ".jsonl"))
    if len(found) != 1:
        what = f"{len(found)} tables" if found else "no .csv or .jsonl table"
        raise FileNotFoundError(
            f"{path} has {what}: write one with the columns file,caption[,label], or "
            "name it with data.train.table"
        )
    return found[0]


def _read_table(table: Path) -> list[_Entry]:
    """The table's images in order, with all the captions that each has."""
    captions: dict[str, list[str]] = {}
    labels: dict[str, str | None] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows: Iterable[dict]
        rows = (
            csv.DictReader(file) if table.suffix == ".csv" else _json_lines(file, table)
        )
        for line, row in enumerate(rows, 1):
            if None in row:
                raise ValueError(
                    f"{table} record {line} has more fields than the header, from "
                    f"{row[None][0]!r} on: put a caption with a comma in double quotes"
                )
            name = _column(row, _FILE, table, line)
            caption = _column(row, _CAPTION, table, line)
            many = caption if isinstance(caption, list) else [caption]
            for field, value in [("file", name), *(("caption", c) for c in many)]:
                if not isinstance(value, str):
                    raise ValueError(
                        f"{table} record {line}: a {field} is text, not {value!r}"
                    )
            name = PurePath(name).as_posix()
            captions.setdefault(name, []).extend(many)
            label = None if row.get("label") in (None, "") else str(row["label"])
            if labels.setdefault(name, label) is None:
                labels[name] = label
            elif label not in (None, labels[name]):
                raise ValueError(
                    f"{table} gives {name} two labels, {labels[name]!r} and {label!r}"
                )
    if not captions:
        raise ValueError(f"{table} lists no images")
    return [_Entry(f, tuple(c), labels[f]) for f, c in captions.items()]


def _json_lines(file: Iterable[str], table: Path) -> Iterable[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{table} line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{table} line {number} is not a JSON object: {line[:40]!r}"
                )
            yield row


def _column(row: dict, names: tuple[str, ...], table: Path, line: int):  # type: ignore[no-untyped-def]
    for name in names:
        if row.get(name):
            return row[name]
    found = ", ".join(str(key) for key in row)
    raise ValueError(f"{table} record {line} has no {names[0]!r} (it has: {found})")


def _check_inside(path: Path, file: str, table: Path) -> None:
    pure = PurePath(file)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{table}: {file!r} leaves the folder {path}")
    if not (path / file).is_file():
        raise FileNotFoundError(
            f"{table} names {file!r}, which is not in {path}: add the "
            "file or delete the line"
        )


def _hash(text: str) -> float:
    """A stable number in [0, 1) for a string."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
