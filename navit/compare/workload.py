"""Reads a workload: a table of requests, or a folder of images."""

from __future__ import annotations

import collections
import csv
import difflib
import io
import json
import os
from pathlib import Path
from typing import Any

from navit.compare.arguments import size_in
from navit.compare.shown import shown
from navit.plan.strategies.choose import Request

_COLUMNS = ("kind", "size", "image", "count", "scale", "images", "frames", "limit")


def read(path: Path) -> dict[str, list[Request]]:
    """The requests of each kind, in order.

    Raises:
      FileNotFoundError, ValueError: for a table that is missing, empty or wrong, and an
        image that cannot be read.
    """
    requests = _of_folder(path) if path.is_dir() else _of_table(path)
    kinds: dict[str, list[Request]] = {}
    for request in requests:
        kinds.setdefault(request.kind, []).append(request)
    return kinds


def _of_folder(folder: Path) -> list[Request]:
    """Images of equal size are one request; each subfolder is a kind."""
    counts: collections.Counter[tuple[str, int, int]] = collections.Counter()
    for image in shown([str(folder)]):
        inside = Path(os.path.relpath(image.name, folder)).parts
        kind = inside[0] if len(inside) > 1 else folder.resolve().name
        counts[kind, image.height, image.width] += 1
    return [Request(*key, count) for key, count in sorted(counts.items())]


def _of_table(path: Path) -> list[Request]:
    if not path.exists():
        raise FileNotFoundError(f"there is no workload {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is no table: {error}. A workload is a .csv, a .json list of "
            "objects, or a folder of images"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a list of objects, one for each request")
    if not rows:
        raise ValueError(f"{path} has no requests: give it a row for each size")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_request(row, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return found


def _request(row: dict[Any, Any], folder: Path) -> Request:
    for name in row:
        if name not in _COLUMNS:
            near = difflib.get_close_matches(str(name), _COLUMNS, n=1)
            remedy = (
                f"did you mean {near[0]}?" if near else "known: " + ", ".join(_COLUMNS)
            )
            raise ValueError(f"there is no column {name!r}; {remedy}")
    given = {key: value for key, value in row.items() if value not in (None, "")}
    if ("size" in given) == ("image" in given):
        raise ValueError(
            "it must have a column size (WIDTHxHEIGHT, such as 600x1500) or image (a "
            "file), and only one of them"
        )
    if "size" in given:
        size = size_in(str(given["size"]))
        if size is None:
            raise ValueError(
                f"size must be WIDTHxHEIGHT, such as 600x1500, not {given['size']!r}"
            )
    else:
        (image,) = shown([str(folder / str(given["image"]))])
        size = image.height, image.width
    return Request(
        str(given.get("kind", "all")),
        *size,
        number=_whole(given, "count", 1),
        scale=_scale(given.get("scale", 0)),
        images=_whole(given, "images", 1),
        frames=_whole(given, "frames", 1),
        limit=_whole(given, "limit", 1) if "limit" in given else None,
    )


def _whole(given: dict[Any, Any], name: str, default: int) -> int:
    value = str(given.get(name, default)).strip()
    if not value.isdecimal() or not int(value):
        raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    return int(value)


def _scale(value: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = -1
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale must be a number of at least 0, not {value!r}")
    return scale
