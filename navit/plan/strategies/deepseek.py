"""DeepSeek-VL2 and DeepSeek-OCR: a global view beside tiles."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.anyres import Canvases, best_canvas
from navit.plan.strategies.internvl import grids_within, nearest_grid, tiled
from navit.plan.strategies.views import Block, Layout, Separator, View

GREY = (127, 127, 127)

# DeepSeek-VL2 tiles no image of a request that has more images than this.
_MOST_TILED = 2

# DeepSeek-OCR cuts no tiles if both sides are at most this, whatever the tiles' size.
_SMALL = 640


@dataclasses.dataclass(frozen=True)
class DeepSeekVL2:
    """The padded image, then tiles of the best canvas of at most `max_tiles` tiles.

    If a request has more than two images, each has one tile. Even a single tile comes
    beside the global view, which shows the same then.

    From `select_best_resolution` and `tokenize_with_images` in DeepSeek-VL2's
    processing_deepseek_vl_v2.py (arXiv 2412.10302).
    """

    tile: int = 384
    max_tiles: int = 9
    patch: int = dataclasses.field(default=14, kw_only=True)

    short: ClassVar[str] = "deepseek_vl2"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "max_tiles", "patch")
        views.check_sides(self, "tile")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        rows, columns = self._grid(height, width, images)
        side, patch = self.tile, self.patch
        canvas = (rows * side, columns * side)
        size, offset = views.contained(height, width, canvas)
        cut = views.tiles(
            height,
            width,
            size,
            (side, side),
            (rows, columns),
            patch,
            offset=offset,
            fill=GREY,
        )
        return (
            views.padded(height, width, (side, side), patch, GREY, "thumbnail"),
            *cut,
        )

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        self.views(height, width, images=images)  # raises for a size that it refuses
        rows, columns = self._grid(height, width, images)
        side = -(-(self.tile // self.patch) // 2)  # 27 patches, padded to 28
        return (
            Block(0, side, side, newlines=True),
            Separator("view separator"),
            Block(None, side * rows, side * columns, newlines=True),
        )

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """2x2 patches a token, a newline after each row, and one separator."""
        return views.count(self.layout(height, width, images=images))

    def _grid(self, height: int, width: int, images: int) -> tuple[int, int]:
        views.check(height, width, images)
        if images > _MOST_TILED:
            return 1, 1
        high, wide = best_canvas(height, width, _canvases(self.tile, self.max_tiles))
        return high // self.tile, wide // self.tile


@functools.cache
def _canvases(tile: int, most: int) -> Canvases:
    """All canvases of at most `most` tiles, as the checkpoints' config lists them."""
    return tuple(
        (tile * rows, tile * columns)
        for tiles in range(1, most + 1)
        for short in range(1, tiles + 1)
        if tiles % short == 0 and short * short <= tiles
        for rows, columns in dict.fromkeys(
            ((tiles // short, short), (short, tiles // short))
        )
    )


@dataclasses.dataclass(frozen=True)
class DeepSeekOCR:
    """One view of a fixed size, or in mode "gundam" tiles and a padded global view.

    `mode`: "tiny" (512 pixels) and "small" (640) squash; "base" (1024) and "large"
    (1280) pad; "gundam" adds to a padded view of `base` pixels 2 to `max_tiles` tiles
    of `tile` pixels, chosen by InternVL's rule, unless both sides have at most 640
    pixels. The encoder sees the global view first, the language model last.

    From process/image_process.py of DeepSeek-OCR's vLLM code (arXiv 2510.18234); its
    `infer` takes up to 9 tiles.
    """

    mode: Literal["tiny", "small", "base", "large", "gundam"] = "gundam"
    base: int = 1024
    tile: int = dataclasses.field(default=640, kw_only=True)
    min_tiles: int = dataclasses.field(default=2, kw_only=True)
    max_tiles: int = dataclasses.field(default=6, kw_only=True)
    patch: int = dataclasses.field(default=16, kw_only=True)

    short: ClassVar[str] = "deepseek_ocr"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "base", "tile", "min_tiles", "max_tiles", "patch")
        views.check_sides(self, "base", "tile")
        if self.mode not in ("tiny", "small", "base", "large", "gundam"):
            raise ValueError(
                'DeepSeekOCR.mode must be "tiny", "small", "base", "large" or '
                f'"gundam", not {self.mode!r}'
            )
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"DeepSeekOCR.min_tiles={self.min_tiles} is more than "
                f"max_tiles={self.max_tiles}"
            )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        grid, patch = self._grid(height, width, images), self.patch
        if self.mode in ("tiny", "small"):
            side = self._side
            return (views.whole(height, width, (side, side), patch),)
        square = (self._side, self._side)
        if grid is None:
            return (views.padded(height, width, square, patch, GREY),)
        return (
            views.padded(height, width, square, patch, GREY, "thumbnail"),
            *tiled(height, width, self.tile, grid, patch, False),
        )

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        self.views(height, width, images=images)  # raises for a size that it refuses
        grid = self._grid(height, width, images)
        side = _compressed(self._side, self.patch)
        end = Separator("view separator")
        if grid is None:
            return Block(0, side, side, newlines=True), end
        rows, columns = grid
        tile = _compressed(self.tile, self.patch)
        return (
            Block(None, tile * rows, tile * columns, newlines=True),
            Block(0, side, side, newlines=True),
            end,
        )

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """4x4 patches a token, a newline after each row, and one separator.

        The published counts (64, 100, 256, 400) leave newlines and separator out.
        """
        return views.count(self.layout(height, width, images=images))

    @property
    def _side(self) -> int:
        """Side of the global view in pixels."""
        sides = {"tiny": 512, "small": 640, "base": 1024, "large": 1280}
        return sides.get(self.mode, self.base)

    def _grid(self, height: int, width: int, images: int) -> tuple[int, int] | None:
        """(rows, columns) of tiles; None if there are none."""
        views.check(height, width, images)
        if self.mode != "gundam" or max(height, width) <= _SMALL:
            return None
        grids = grids_within(self.min_tiles, self.max_tiles)
        grid = nearest_grid(height, width, self.tile, grids)
        return grid if grid != (1, 1) else None


def _compressed(side: int, patch: int) -> int:
    """Tokens along a side, after convolutions that merge 4x4 patches."""
    return -(-(side // patch) // 4)
