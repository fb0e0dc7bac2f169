"""Tables of `file,caption[,label]`: CSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

SUFFIXES = (".csv", ".jsonl", ".parquet")

# Column names as other trainers' tables have them (transformers, open_clip).
_FILE = ("file", "file_name", "filepath")
_CAPTION = ("caption", "text", "title")


class Entry(NamedTuple):
    """One image of a table."""

    file: str
    captions: tuple[str, ...]
    label: str | None


def read_table(file: BinaryIO, table: str) -> list[Entry]:
    """The table's images in order, with all the captions that each has.

    One with a label may have none.

    Args:
      table: its name, which says by its suffix what the file holds.

    Raises:
      ValueError: if it cannot be read, lists nothing, or a row is not complete.
    """
    try:
        return _entries(_rows(file, table), table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from None


def _rows(file: BinaryIO, table: str) -> Iterable[dict]:
    if table.endswith(".parquet"):
        return _parquet_rows(file, table)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    return csv.DictReader(text) if table.endswith(".csv") else _json_lines(text, table)


def _parquet_rows(file: BinaryIO, table: str) -> Iterator[dict]:
    parquet = import_parquet(table).ParquetFile(file)
    names = parquet.schema_arrow.names
    if not any(name in names for name in _FILE):
        raise ValueError(
            f"{table} has no {_FILE[0]!r} (it has: {', '.join(names)}); rows that hold "
            "the images themselves are read by ParquetImages(path=...)"
        )
    columns = [name for name in (*_FILE, *_CAPTION, "label") if name in names]
    for batch in parquet.iter_batches(columns=columns):
        yield from batch.to_pylist()


def import_parquet(path: str) -> Any:
    """pyarrow.parquet, or a ValueError that says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow to be read: pip install pyarrow"
        ) from None
    return pyarrow.parquet


def _entries(rows: Iterable[dict], table: str) -> list[Entry]:
    captions: dict[str, list[str]] = {}
    labels: dict[str, str | None] = {}
    for line, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(
                f"{table} record {line} has more fields than the header, from "
                f"{row[None][0]!r} on: put a caption with a comma in double quotes"
            )
        name = _column(row, _FILE, table, line)
        label = None if row.get("label") in (None, "") else str(row["label"])
        caption = _column(row, _CAPTION, table, line, must=label is None)
        many = caption if isinstance(caption, list) else [caption] if caption else []
        for field, value in [("file", name), *(("caption", c) for c in many)]:
            if not isinstance(value, str):
                raise ValueError(
                    f"{table} record {line}: a {field} is text, not {value!r}"
                )
        name = PurePath(name).as_posix()
        captions.setdefault(name, []).extend(many)
        if labels.setdefault(name, label) is None:
            labels[name] = label
        elif label not in (None, labels[name]):
            raise ValueError(
                f"{table} gives {name} two labels, {labels[name]!r} and {label!r}"
            )
    if not captions:
        raise ValueError(f"{table} lists no images")
    return [Entry(f, tuple(c), labels[f]) for f, c in captions.items()]


def _json_lines(file: Iterable[str], table: str) -> Iterable[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{table} line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{table} line {number} is not a JSON object: {line[:40]!r}"
                )
            yield row


def _column(
    row: dict, names: tuple[str, ...], table: str, line: int, *, must: bool = True
) -> Any:
    for name in names:
        if row.get(name):
            return row[name]
    if not must:
        return None
    if given := [name for name in names if name in row]:
        remedy = "write one, add a label, or delete the line"
        raise ValueError(
            f"{table} record {line} ({next(iter(row.values()))}) has an empty "
            f"{given[0]!r}: {remedy if names is _CAPTION else 'delete the line'}"
        )
    found = ", ".join(str(key) for key in row)
    raise ValueError(f"{table} record {line} has no {names[0]!r} (it has: {found})")
