"""The table of results: its rows in files, and as text.

A row is one evaluation at one budget. Tables grow: a row is replaced only by the same
evaluation of the same weights on the same data.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from navit.evals.notes import Page
from navit.files import write_atomic

log = logging.getLogger("navit")

# One evaluation at one budget; JSON data.
Row = dict[str, Any]

# What identifies a row, or a cascade. The rest is measured.
_IDENTITY = (
    "step",
    "weights",
    "set",
    "kind",
    "budget",
    "small",
    "large",
    "images",
    "data",
    "settings",
)
# A cascade has a point for every 5 % of the images; the tables show every fifth point.
_EVERY = 5
_COLUMNS = ("set", "kind", "tokens", "used", "enlarged", "images", "GFLOPs", "images/s")


def write(
    out: Path,
    rows: Sequence[Row],
    cascades: Sequence[Row],
    pages_at: Callable[[int], Sequence[Page]],
) -> tuple[list[Row], list[Row]]:
    """Adds to budgets.json in a folder, and writes the same to .md and .csv.

    Several processes may add to one table. Returns all rows and all cascades.

    Args:
      pages_at: what typical pages become at a budget.

    Raises:
      ValueError: if budgets.json is not a table.
    """
    with _locked(out / "budgets.lock"):
        before = read(out / "budgets.json")
        whole = (
            _merged(before["rows"], rows),
            _merged(before["cascades"], cascades),
        )
        budgets = sorted({row["budget"] for row in whole[0]})
        pages = [page for budget in budgets for page in pages_at(budget)]
        data = json.dumps({"rows": whole[0], "cascades": whole[1]}, indent=2)
        write_atomic(out / "budgets.json", f"{data}\n".encode())
        write_atomic(out / "budgets.md", markdown(*whole, pages).encode())
        write_atomic(out / "budgets.csv", _csv(whole[0]).encode())
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


def text(rows: Sequence[Row], cascades: Sequence[Row]) -> str:
    """The results for a terminal."""
    blocks = [_aligned([(*_COLUMNS, "results (chance)"), *map(_cells, rows)])]
    if cascades:
        blocks.append(_aligned(_cascade_cells(cascades)))
    lines = dict.fromkeys(f"note: {note}" for row in rows for note in row["notes"])
    return "\n".join(["\n\n".join(blocks), *lines])


def markdown(
    rows: Sequence[Row], cascades: Sequence[Row], pages: Sequence[Page]
) -> str:
    """The results as Markdown."""
    header = ("step", *_COLUMNS, "results (chance)", "notes", "date")
    cells = [
        (str(row["step"]), *_cells(row), "; ".join(row["notes"]), row["date"])
        for row in rows
    ]
    blocks = ["# Results by token budget", _piped([header, *cells])]
    if cascades:
        blocks.append(_piped(_cascade_cells(cascades)))
    if pages:
        blocks += ["What a page becomes:", _piped(_page_cells(pages))]
    return "\n\n".join(blocks) + "\n"


def page_text(pages: Sequence[Page]) -> str:
    """What typical pages become, for a terminal."""
    return _aligned(_page_cells(pages))


def logged(rows: Sequence[Row]) -> dict[str, float]:
    """The results by name, for the log of a run."""
    return {
        f"eval/{row['set']}/{row['kind']}/{row['budget']}/{metric}": value
        for row in rows
        for metric, value in row["metrics"].items()
    }


def label(metric: str) -> str:
    """The name of a metric for people."""
    metric = re.sub(r"_r(\d+)$", r" R@\1", metric.replace("_to_", "→"))
    return {"top5": "top-5", "calibration_error": "ECE"}.get(metric, metric)


def _merged(before: Sequence[Row], added: Sequence[Row]) -> list[Row]:
    """Rows in the order of step and set, each identity once."""
    whole: dict[str, Row] = {}
    for row in (*before, *added):
        identity = json.dumps([row.get(name) for name in _IDENTITY])
        speed = whole.get(identity, {}).get("images_per_second")
        if speed is not None and row["images_per_second"] is None:
            row = {**row, "images_per_second": speed}  # nothing was embedded this time
        whole[identity] = row
    return sorted(
        whole.values(),
        key=lambda row: (row["step"], row["set"], row["kind"], row.get("budget", 0)),
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


def _cells(row: Row) -> tuple[str, ...]:
    results: list[str] = []
    direction = ""
    for name, value in row["metrics"].items():
        first, _, rest = label(name).partition(" ")
        # "image→text" only once, before all its recalls.
        title = rest if rest and first == direction else label(name)
        direction = first
        if name == "calibration_error":
            results.append(f"{title} {value:.3f}")
        else:
            guess = row["chance"].get(name)
            of = "" if guess is None else f" ({guess:.1%})"
            results.append(f"{title} {value:.1%}{of}")
    flops, enlarged = row.get("flops_per_image"), row.get("enlarged")
    speed, lost = row["images_per_second"], row["unreadable"]
    return (
        row["set"],
        row["kind"],
        str(row["budget"]),
        f"{row['tokens_per_image']:.1f}",
        "-" if enlarged is None else f"{enlarged:.0%}",
        str(row["images"]) + (f" ({lost} unreadable)" if lost else ""),
        "-" if flops is None else f"{flops / 1e9:.3g}",
        "-" if speed is None else f"{speed:.1f}",
        ", ".join(results) or "no image counts",
    )


def _cascade_cells(cascades: Sequence[Row]) -> list[tuple[str, ...]]:
    """Accuracy (and GFLOPs an image) by the share that is sent to the larger budget."""
    shares = [f"{i / 20:.0%} sent" for i in range(0, 21, _EVERY)]
    lines = [("cascade", "step", "tokens", *shares)]
    for cascade in cascades:
        points = [
            f"{accuracy:.1%} ({flops / 1e9:.3g})"
            for _, accuracy, flops in cascade["points"][::_EVERY]
        ]
        budgets = f"{cascade['small']}→{cascade['large']}"
        name = f"{cascade['set']}, {cascade['kind']}"
        lines.append((name, str(cascade["step"]), budgets, *points))
    return lines


def _page_cells(pages: Sequence[Page]) -> list[tuple[str, ...]]:
    header = ("page", "tokens", "grid", "pixels (height x width)", "effective dpi")
    return [
        header,
        *(
            (
                f"{page.name}",
                f"{page.budget}",
                f"{page.grid[0]}x{page.grid[1]}",
                f"{page.pixels[0]}x{page.pixels[1]}",
                f"{page.dpi}",
            )
            for page in pages
        ),
    ]


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _piped(lines: Sequence[tuple[str, ...]]) -> str:
    header, *rest = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rest))


def _csv(rows: Sequence[Row]) -> str:
    flat = []
    for row in rows:
        simple = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        chance = {f"chance_{name}": value for name, value in row["chance"].items()}
        flat.append(
            {**simple, **row["metrics"], **chance, "notes": "; ".join(row["notes"])}
        )
    columns = dict.fromkeys(name for row in flat for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


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
