"""The files of the table of results.

A row is one evaluation at one budget. Tables grow: a row is replaced only by the same
evaluation of the same weights on the same data.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from navit.evals import tables
from navit.evals.notes import Page
from navit.evals.row import Row, identity, series
from navit.files import write_atomic

log = logging.getLogger("navit")


def write(
    out: Path,
    rows: Sequence[Row],
    cascades: Sequence[Row],
    pages_at: Callable[[int], Sequence[Page]],
) -> tuple[list[Row], list[Row]]:
    """Adds to budgets.json in a folder, and writes the same to .md and .csv.

    Several processes may add to one table. Returns all rows and all cascades.

    Args:
      pages_at: what typical pages become at a budget, without a strategy.

    Raises:
      ValueError: if budgets.json is not a table.
    """
    with _locked(out / "budgets.lock"):
        before = read(out / "budgets.json")
        whole = (
            _merged(before["rows"], rows),
            _merged(before["cascades"], cascades),
        )
        plain = [row for row in whole[0] if not row.get("strategy")]
        budgets = sorted({row["budget"] for row in plain})
        pages = [page for budget in budgets for page in pages_at(budget)]
        data = json.dumps({"rows": whole[0], "cascades": whole[1]}, indent=2)
        write_atomic(out / "budgets.json", f"{data}\n".encode())
        write_atomic(out / "budgets.md", tables.markdown(*whole, pages).encode())
        write_atomic(out / "budgets.csv", tables.as_csv(whole[0]).encode())
    return whole


def read(path: Path) -> dict[str, list[Row]]:
    """The rows and the cascades of a table, of this version or an earlier one."""
    if not path.is_file():
        return {"rows": [], "cascades": []}
    try:
        data = json.loads(path.read_text())
        return {"rows": _upgraded(data), "cascades": data.get("cascades", [])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of results ({error!r}): move it away, or name "
            "another folder with --out"
        ) from error


def logged(rows: Sequence[Row]) -> dict[str, float]:
    """The results by name, for the log of a run."""
    return {
        f"eval/{row['set']}/{row['kind']}/{row['budget']}/{metric}": value
        for row in rows
        for metric, value in row["metrics"].items()
    }


def _merged(before: Sequence[Row], added: Sequence[Row]) -> list[Row]:
    """Rows in the order of step and set, each identity once; the latest is last."""
    whole: dict[str, Row] = {}
    for row in (*before, *added):
        key = identity(row)
        speed = whole.pop(key, {}).get("images_per_second")
        if speed is not None and row["images_per_second"] is None:
            row = {**row, "images_per_second": speed}  # nothing was embedded this time
        whole[key] = row
    first = {series(row): i for i, row in reversed([*enumerate(whole.values())])}
    return sorted(
        whole.values(),
        key=lambda row: (
            row["step"],
            row["set"],
            row["kind"],
            first[series(row)],
            row.get("budget", 0),
        ),
    )


def _upgraded(data: dict[str, Any]) -> list[Row]:
    """The rows of a table; an earlier version had one step and one set in a file."""
    if "budgets" not in data:
        return data["rows"]
    measured = ("unreadable", "tokens_per_image", "images_per_second")
    return [
        {
            "step": data["step"],
            "set": "data.eval",
            "kind": "all",
            "budget": int(budget),
            "images": data["images"],
            "data": data["data"],
            **{name: values.get(name) for name in measured},
            "metrics": {k: v for k, v in values.items() if k not in measured},
            "chance": data["chance"],
            "notes": [],
            "date": data["date"],
            "navit": data["navit"],
        }
        for budget, values in data["budgets"].items()
    ]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a table; the kernel releases it when a process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("cannot lock %s (%s)", path, error.strerror)
        yield
