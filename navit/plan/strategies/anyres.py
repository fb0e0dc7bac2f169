"""LLaVA-NeXT's and LLaVA-OneVision's anyres: tiles of the canvas that fits best."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.square import CLIP_MEAN, pad_to_square
from navit.plan.strategies.views import BLACK, Block, Layout, Separator, View

Canvases = tuple[tuple[int, int], ...]

_NEXT = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """A squashed thumbnail, then tiles of a canvas on which the image is padded.

    `canvases`: (height, width) of each candidate. The one wins on which most of the
    image's pixels remain, then the one with the least waste, then the earlier one. An
    image smaller than every canvas ties on all of them, so it takes the earliest.

    `shrink_above`: if set, a map of more than 1.1² times this many tiles' tokens is
    shrunk to that many (9 in LLaVA-OneVision's anyres_max_9).

    If a request has several images, each is one view, padded to a square.

    From `select_best_resolution` and `process_anyres_image` in llava/mm_utils.py and
    `unpad_image` in llava/model/llava_arch.py of LLaVA-NeXT. The transformers port
    reads the canvases as (width, height) pairs and so differs for small images.
    """

    tile: int = 336
    patch: int = 14
    canvases: Canvases = dataclasses.field(default=_NEXT, kw_only=True)
    shrink_above: int | None = dataclasses.field(default=None, kw_only=True)
    fill: tuple[int, int, int] = dataclasses.field(default=CLIP_MEAN, kw_only=True)

    short: ClassVar[str] = "anyres"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    @staticmethod
    def grid(tile: int, rows: int, columns: int) -> Canvases:
        """Canvases of 1x1 to rows x columns tiles, in LLaVA-OneVision's order."""
        return tuple(
            (tile * row, tile * column)
            for column in range(1, columns + 1)
            for row in range(1, rows + 1)
        )

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "patch")
        views.check_sides(self, "tile")
        if self.shrink_above is not None:
            views.check_fields(self, "shrink_above")
        if not self.canvases:
            raise ValueError("AnyRes.canvases must not be empty")
        for high, wide in self.canvases:
            if high < 1 or wide < 1 or high % self.tile or wide % self.tile:
                raise ValueError(
                    f"the canvas {high}x{wide} is not made of tiles of {self.tile} "
                    "pixels: change AnyRes.canvases or AnyRes.tile"
                )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        side, patch = self.tile, self.patch
        if images > 1:
            return (pad_to_square(height, width, side, patch, self.fill),)
        canvas = self._canvas(height, width)
        size = _inside(height, width, canvas)
        cut = views.tiles(
            height,
            width,
            size,
            (side, side),
            (canvas[0] // side, canvas[1] // side),
            patch,
            offset=((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2),
            fill=BLACK,
        )
        return views.whole(height, width, (side, side), patch, "thumbnail"), *cut

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        views.check(height, width, images)
        side = self.tile // self.patch
        if images > 1:
            return Block(0, side, side), Separator("newline")
        canvas = self._canvas(height, width)
        rows, columns = unpadded(
            height,
            width,
            canvas[0] // self.tile * side,
            canvas[1] // self.tile * side,
        )
        if self.shrink_above is not None:
            times = math.sqrt(rows * columns / (self.shrink_above * side**2))
            if times > 1.1:
                rows, columns = int(rows // times), int(columns // times)
        return Block(0, side, side), Block(None, rows, columns, newlines=True)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """The thumbnail's tokens, and the tiles' map without its padding.

        Each row of the map ends in a newline, which counts.
        """
        return views.count(self.layout(height, width, images=images))

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        return best_canvas(height, width, self.canvases)


def best_canvas(height: int, width: int, canvases: Canvases) -> tuple[int, int]:
    """The canvas on which most pixels remain, then with the least waste."""
    area, best, chosen = height * width, (-1, 0), canvases[0]
    for high, wide, surface in _with_areas(canvases):
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), area)
        if (kept, kept - surface) > best:
            best, chosen = (kept, kept - surface), (high, wide)
    return chosen


@functools.cache
def _with_areas(canvases: Canvases) -> tuple[tuple[int, int, int], ...]:
    return tuple((high, wide, high * wide) for high, wide in canvases)


def _inside(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest size with the image's aspect on a canvas; the shorter side is up."""
    high, wide = canvas
    if wide / width < high / height:
        return min(math.ceil(height * (wide / width)), high), wide
    return high, min(math.ceil(width * (high / height)), wide)


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """The part of a padded map of tokens that holds the image.

    It is empty in one direction for an image that is far from the canvas' aspect.
    """
    if width / height > columns / rows:
        kept = int(height * (columns / width))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(width * (rows / height))
    return rows, columns - 2 * ((columns - kept) // 2)
