"""What an evaluation yields: a value beside that of guessing."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A measured value, and what guessing would give; None: nothing.

    `of`: how many images (of text to image, texts) the value is the mean over.
    """

    name: str
    value: float
    of: int
    chance: float | None = None
