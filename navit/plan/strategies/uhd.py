"""LLaVA-UHD's and MiniCPM-V's slices: cells of the image's own aspect."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.views import Block, Layout, Separator, View

Rounding = Callable[[float], int]


@dataclasses.dataclass(frozen=True)
class LLaVAUHD:
    """Slices of a grid of the image's aspect, then an overview of it.

    The number of slices follows from the area, up to `max_slices`. Each slice and the
    overview have about the area of a square of `tile` pixels, and whole patches.

    From llava/slice_process.py of LLaVA-UHD (arXiv 2403.11703), version 1, whose
    scripts pass 7 as the most slices.
    """

    tile: int = 336
    max_slices: int = 6
    patch: int = dataclasses.field(default=14, kw_only=True)
    queries: int = dataclasses.field(default=144, kw_only=True)

    short: ClassVar[str] = "llava_uhd"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "max_slices", "patch", "queries")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        overview, slices = sliced(
            height, width, self.tile, self.max_slices, self.patch, math.floor
        )
        return *slices, overview

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        *slices, _overview = self.views(height, width, images=images)
        parts: list[Block | Separator] = []
        for i in range(len(slices)):
            row_ends = i + 1 == len(slices) or slices[i + 1].window[1] == 0
            parts.append(Block(i, 1, self.queries))
            parts.append(Separator("newline" if row_ends else "comma"))
        return *parts, Block(len(slices), 1, self.queries)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`queries` tokens a view, and a comma or a newline after each slice."""
        return views.count(self.layout(height, width, images=images))


@dataclasses.dataclass(frozen=True)
class MiniCPMV:
    """An overview, then slices of a grid of the image's aspect.

    As `LLaVAUHD`, but sides are rounded to the nearest number of patches.

    From `slice_image` in finetune/dataset.py of MiniCPM-V (arXiv 2408.01800).
    """

    tile: int = 448
    max_slices: int = 9
    patch: int = dataclasses.field(default=14, kw_only=True)
    queries: int = dataclasses.field(default=64, kw_only=True)

    short: ClassVar[str] = "minicpm_v"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "max_slices", "patch", "queries")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        overview, slices = sliced(
            height, width, self.tile, self.max_slices, self.patch, round
        )
        return overview, *slices

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        seen = range(len(self.views(height, width, images=images)))
        return tuple(Block(i, 1, self.queries) for i in seen)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`queries` tokens a view, without tags and newlines, which are text."""
        return views.count(self.layout(height, width, images=images))


def sliced(
    height: int, width: int, tile: int, most: int, patch: int, rounding: Rounding
) -> tuple[View, tuple[View, ...]]:
    """The overview and the slices, which are none for a small image."""
    fit = functools.partial(_fitted, tile, patch, rounding)
    wanted = min(math.ceil(width * height / (tile * tile)), most)
    if wanted <= 1:
        return views.whole(height, width, fit(height, width), patch), ()
    rows, columns = _grid(math.log(width / height), wanted, most)
    high, wide = fit(
        _divisible(height, rows, rounding) / rows,
        _divisible(width, columns, rounding) / columns,
    )
    overview = views.whole(height, width, fit(height, width), patch, "thumbnail")
    canvas = (high * rows, wide * columns)
    return overview, views.tiles(
        height, width, canvas, (high, wide), (rows, columns), patch
    )


def _fitted(
    tile: int,
    patch: int,
    rounding: Rounding,
    height: int | float,
    width: int | float,
) -> tuple[int, int]:
    """The size of this aspect with the area of a tile, in whole patches."""
    aspect = width / height
    high = int(tile / math.sqrt(aspect))
    wide = int(high * aspect)
    return _divisible(high, patch, rounding), _divisible(wide, patch, rounding)


def _divisible(length: int | float, by: int, rounding: Rounding) -> int:
    return max(by * rounding(length / by), by)


def _grid(log_aspect: float, wanted: int, most: int) -> tuple[int, int]:
    """The (rows, columns) of nearest aspect, of about the wanted number of slices.

    For a square image and 6 slices, the last bit of a float64 logarithm decides.
    """
    best, chosen = float("inf"), (1, 1)
    for rows, columns, log_grid in _candidates(wanted, most):
        error = abs(log_aspect - log_grid)
        if error < best:
            best, chosen = error, (rows, columns)
    return chosen


@functools.cache
def _candidates(wanted: int, most: int) -> tuple[tuple[int, int, float], ...]:
    return tuple(
        (slices // columns, columns, math.log(columns / (slices // columns)))
        for slices in (wanted - 1, wanted, wanted + 1)
        if slices != 1 and slices <= most
        for columns in range(1, slices + 1)
        if slices % columns == 0
    )
