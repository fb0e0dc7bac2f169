"""UReader's and DocOwl 1.5's shape-adaptive cropping: the anchor of largest overlap."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import numpy as np

from navit.plan.strategies import views
from navit.plan.strategies.views import Block, Layout, Separator, View

# The longest side of an anchor, in cells.
_LONGEST = 11

# DocOwl's anchors of up to 9 cells, as (rows, columns), in its order, which decides
# between equal scores.
_ORDER = "11 12 21 13 31 22 14 41 15 51 16 61 23 32 17 71 42 24 18 81 33 19 91"
_DOCOWL = tuple((int(grid[0]), int(grid[1])) for grid in _ORDER.split())


@dataclasses.dataclass(frozen=True)
class UReader:
    """A squashed global view, then tiles of the anchor that overlaps the image most.

    Anchors are all grids of at most `max_cells` cells and 11 cells a side. The score of
    an anchor is its overlap (IoU) with the image, plus a hundred times its overlap with
    the image resized to the anchor's width, in float32. `queries` are the tokens of a
    view, without its end.

    From `anchor_rank` in UReader's and DocOwl 1.5's processors (arXiv 2310.05126,
    2403.12895). DocOwl 1.5 is `UReader(448, 9, queries=256)`.
    """

    tile: int = 224
    max_cells: int = 20
    patch: int = dataclasses.field(default=14, kw_only=True)
    queries: int = dataclasses.field(default=64, kw_only=True)

    short: ClassVar[str] = "ureader"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "max_cells", "patch", "queries")
        views.check_sides(self, "tile")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        side, patch = self.tile, self.patch
        rows, columns = _anchor(height, width, side, self.max_cells)
        size = (rows * side, columns * side)
        return (
            views.whole(height, width, (side, side), patch, "thumbnail"),
            *views.tiles(height, width, size, (side, side), (rows, columns), patch),
        )

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        parts: list[Block | Separator] = []
        for i in range(len(self.views(height, width, images=images))):
            parts += [Block(i, 1, self.queries), Separator("end of view")]
        return tuple(parts)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`queries` tokens and the end of each view."""
        return views.count(self.layout(height, width, images=images))


def _anchor(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """The (rows, columns) of the anchor with the highest score, the first of equals.

    The box of the anchor's width and the image's aspect has a height in whole pixels,
    as the original keeps boxes as integers.
    """
    anchors, highs, wides = _sides(side, most)
    areas = highs * wides
    same_width = (np.float32(height / width) * wides.astype(np.float32)).astype(int)

    def overlap(high: np.ndarray, wide: np.ndarray) -> np.ndarray:
        shared = np.minimum(highs, high) * np.minimum(wides, wide)
        union = (areas + high * wide - shared).astype(np.float32)
        return shared.astype(np.float32) / (union + np.float32(1e-5))

    shape = overlap(same_width, wides)
    score = shape * np.float32(100) + overlap(np.array(height), np.array(width))
    return anchors[int(score.argmax())]


@functools.cache
def _sides(
    side: int, most: int
) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    """Anchors, and their heights and widths in pixels `[m]`."""
    anchors = tuple(
        (rows, cells // rows)
        for cells in range(1, most + 1)
        for rows in range(1, cells + 1)
        if cells % rows == 0 and max(rows, cells // rows) <= _LONGEST
    )
    anchors = _DOCOWL if most == 9 else anchors
    rows, columns = np.array(anchors).T
    return anchors, rows * side, columns * side
