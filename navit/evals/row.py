"""A row of the table of results, and what tells rows apart."""

from __future__ import annotations

import json
import re
from typing import Any

# One evaluation at one budget, or a cascade between two; JSON data.
Row = dict[str, Any]

# Results that share these are points of one line, one for each budget.
_SERIES = ("step", "weights", "set", "kind", "images", "data", "settings")


def series(row: Row) -> str:
    """What results at several budgets must share to be compared with one another."""
    return json.dumps([row.get(name) for name in _SERIES])


def identity(row: Row) -> str:
    """What a row must share with another to replace it."""
    budgets = [row.get(name) for name in ("budget", "small", "large")]
    return json.dumps([series(row), *budgets])


def origin(row: Row) -> str:
    """The images of a row, its files of class names and prompts, and its strategy."""
    names = ("classes", "prompts", "strategy")
    named = [f"{x} {row[x]}" for x in names if row.get(x)]
    return ", ".join([row.get("source", "-"), *named])


def step(row: Row) -> str:
    """The step; "-" for released weights, which do not have one."""
    return str(row["step"] or "-")


def label(metric: str) -> str:
    """The name of a metric for people."""
    metric = re.sub(r"_r(\d+)$", r" R@\1", metric.replace("_to_", "→"))
    return {"top5": "top-5", "calibration_error": "ECE"}.get(metric, metric)
