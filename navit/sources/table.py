"""Tables of `file,caption[,label]`: CSV, JSONL or Parquet; and Karpathy's JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from navit.sources import karpathy
from navit.sources.missing import check_missing
from navit.sources.records import label_text

# A .json may be anything, so it must be named.
_SUFFIXES = (".csv", ".jsonl", ".parquet")

# Other trainers' names for the columns (transformers, open_clip) are accepted too.
_FILE = ("file", "file_name", "filepath")
_CAPTION = ("caption", "text", "title")

# A CSV record that spans more lines has a quote that was never closed.
_MOST_LINES = 20
_QUOTES = (
    "put a caption with a comma or a line break in double quotes, close them, and "
    "write a double quote inside them twice"
)


def is_table(name: str) -> bool:
    """Whether a file's name has a table's suffix, in any case."""
    return name.lower().endswith(_SUFFIXES)


class Listed(NamedTuple):
    """One image of a table."""

    file: str
    captions: tuple[str, ...]
    label: str | None


def read_table(
    file: BinaryIO,
    table: str,
    root: str,
    *,
    splits: tuple[str, ...] = (),
    missing: float = 0.0,
) -> list[Listed]:
    """The table's images in order, each with all its captions.

    An image with a label may have no caption.

    Args:
      table: the table's name; its suffix gives the format.
      root: the folder of the table's files.
      splits: of Karpathy's JSON, those to read; none: all.
      missing: the share of rows that may have neither a caption nor a label; those are
        left out and named.

    Raises:
      ValueError: if the table cannot be read or is empty, or a row is incomplete.
    """
    try:
        return _entries(_rows(file, table, splits), table, root, missing)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} cannot be read: {error}") from None


def read_files(file: BinaryIO, table: str, root: str) -> list[str]:
    """The files that a table names, each once, in order.

    The arguments are those of `read_table`.
    """
    try:
        named = [_file(row, where, root) for where, row in _rows(file, table)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} cannot be read: {error}") from None
    if not named:
        raise ValueError(f"{table} lists no images")
    return list(dict.fromkeys(named))


def _rows(
    file: BinaryIO, table: str, splits: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict]]:
    """Each row with its place in the table, such as "captions.csv line 3"."""
    suffix = table.lower().rpartition(".")[2]
    if suffix == "parquet":
        yield from _parquet_rows(file, table)
        return
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        if suffix == "json":
            yield from karpathy.rows(text.read(), table, splits)
            return
        read = _csv_rows if suffix == "csv" else _json_lines
        yield from read(text, table)


def _csv_rows(file: Iterable[str], table: str) -> Iterator[tuple[str, dict]]:
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    while True:
        before = reader.line_num
        where = f"{table} line {before + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: {error}: {_QUOTES}") from None
        if row is None:
            return
        if (lines := reader.line_num - before) > _MOST_LINES:
            raise ValueError(
                f"{where} begins a record of {lines} lines, more than {_MOST_LINES}: "
                f"{_QUOTES}"
            )
        if not row:  # a blank line
            continue
        if not header:
            header = row
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{where} has {len(row)} fields, and the header has {len(header)} "
                f"({', '.join(header)}): {_QUOTES}"
            )
        yield where, dict(zip(header, row, strict=True))


def _parquet_rows(file: BinaryIO, table: str) -> Iterator[tuple[str, dict]]:
    parquet = import_parquet(table).ParquetFile(file)
    names = parquet.schema_arrow.names
    if not any(name in names for name in _FILE):
        raise ValueError(
            f"{table} has no {_FILE[0]!r} (it has: {', '.join(names)}); if the rows "
            "contain the images, use ParquetImages(path=...)"
        )
    columns = [name for name in (*_FILE, *_CAPTION, "label") if name in names]
    batches = parquet.iter_batches(columns=columns)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, 1):
        yield f"{table} record {number}", row


def import_parquet(path: str) -> Any:
    """Imports pyarrow.parquet, or raises a ValueError with how to install it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def inside(root: str, file: str, where: str) -> str:
    """A file's path relative to the folder `root`; does not follow links.

    Args:
      where: what names the file, for the error.

    Raises:
      ValueError: if it is outside `root`.
    """
    plain = os.path.normpath(file)
    if "://" not in file and not plain.startswith(("/", "..")):
        return plain
    remote = "://" in root
    roots = [root] if remote else [os.path.abspath(root), os.path.realpath(root)]
    full = file if "://" in file or file.startswith("/") else f"{roots[0]}/{file}"
    scheme, _, path = full.rpartition("://")
    full = f"{scheme}://{os.path.normpath(path)}" if scheme else os.path.normpath(path)
    for folder in roots:
        if full.startswith(f"{folder.rstrip('/')}/"):
            return full[len(folder.rstrip("/")) + 1 :]
    raise ValueError(f"{where}: {file!r} is outside the folder {root}")


def _entries(
    rows: Iterable[tuple[str, dict]], table: str, root: str, missing: float
) -> list[Listed]:
    count, empty = 0, []
    captions: dict[str, list[str]] = {}
    labels: dict[str, str | None] = {}
    for where, row in rows:
        count += 1
        name = _file(row, where, root)
        label = None if row.get("label") in (None, "") else str(row["label"])
        caption = _column(row, _CAPTION, where, must=label is None)
        many = caption if isinstance(caption, list) else [caption] if caption else []
        for value in many:
            if not isinstance(value, str):
                raise ValueError(f"{where}: a caption must be text, not {value!r:.60}")
        many = [value for value in many if value.strip()]
        if not many and not label_text(label):  # no label, or a negative one
            empty.append(f"{where} ({name})")
            continue
        captions.setdefault(name, []).extend(many)
        if labels.setdefault(name, label) is None:
            labels[name] = label
        elif label not in (None, labels[name]):
            raise ValueError(
                f"{table} gives {name} two labels, {labels[name]!r} and {label!r}"
            )
    what, remedy = f"captions of {table}", "write them, or add labels"
    check_missing(empty, count, missing, what, remedy)
    if not captions:
        raise ValueError(f"{table} lists no images")
    return [Listed(f, tuple(c), labels[f]) for f, c in captions.items()]


def _file(row: dict, where: str, root: str) -> str:
    name = _column(row, _FILE, where)
    if not isinstance(name, str):
        raise ValueError(f"{where}: a file name must be text, not {name!r:.60}")
    return inside(root, name, where)


def _json_lines(file: Iterable[str], table: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, 1):
        where = f"{table} line {number}"
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object: {line[:40]!r}")
            yield where, row


def _column(row: dict, names: tuple[str, ...], where: str, *, must: bool = True) -> Any:
    """The first of these columns that is not empty; None if there is no caption."""
    for name in names:
        if row.get(name):
            return row[name]
    given = [name for name in names if name in row]
    if not must or (given and names is _CAPTION):
        return None
    if given:
        raise ValueError(f"{where} has an empty {given[0]!r}: delete the line")
    columns = ", ".join(str(key) for key in row)
    raise ValueError(
        f"{where} has no {names[0]!r} (it has: {columns}): name the columns "
        "file,caption[,label]"
    )
