"""What an evaluation yields: a value beside that of guessing."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A measured value, and what guessing would give; None: nothing."""

    name: str
    value: float
    chance: float | None = None
