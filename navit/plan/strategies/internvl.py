"""Tiles of the grid whose aspect is nearest: InternVL, and tiling by templates."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.views import Block, Layout, Separator, View

Grids = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class InternVL:
    """Squashes the image to a grid of tiles; a squashed thumbnail comes last.

    The grid of `min_tiles` to `max_tiles` tiles whose aspect is nearest wins. If two
    are equally near, the larger wins if the image has more than half of its pixels. The
    images of one request share `max_tiles`, but each has its thumbnail. For the frames
    of a video, InternVL uses `max_tiles=1`.

    From `dynamic_preprocess` in InternVL's train/dataset.py (arXiv 2404.16821).
    """

    tile: int = 448
    min_tiles: int = 1
    max_tiles: int = dataclasses.field(default=12, kw_only=True)
    thumbnail: bool = dataclasses.field(default=True, kw_only=True)
    patch: int = dataclasses.field(default=14, kw_only=True)
    merge: int = dataclasses.field(default=2, kw_only=True)

    short: ClassVar[str] = "internvl"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "min_tiles", "max_tiles", "patch", "merge")
        views.check_sides(self, "tile")
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"InternVL.min_tiles={self.min_tiles} is more than "
                f"max_tiles={self.max_tiles}"
            )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        most = max(1, self.max_tiles // images)
        rows, columns = nearest_grid(
            height, width, self.tile, grids_within(min(self.min_tiles, most), most)
        )
        return tiled(
            height, width, self.tile, (rows, columns), self.patch, self.thumbnail
        )

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        side = self.tile // self.patch // self.merge
        seen = range(len(self.views(height, width, images=images)))
        blocks = tuple(Block(i, side, side) for i in seen)
        return Separator("<img>"), *blocks, Separator("</img>")

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """Each view's tokens, `merge` x `merge` patches a token, and the two tags."""
        return views.count(self.layout(height, width, images=images))


@dataclasses.dataclass(frozen=True)
class Template:
    """Squashes the image to the template of the nearest aspect; the whole comes last.

    Ties are broken as in InternVL. An image that takes one tile has no second view.
    """

    tile: int = 384
    patch: int = 16
    templates: Grids = dataclasses.field(
        default=((1, 1), (1, 2), (2, 1), (2, 2)), kw_only=True
    )

    short: ClassVar[str] = "template"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "patch")
        views.check_sides(self, "tile")
        if not self.templates or any(min(grid) < 1 for grid in self.templates):
            raise ValueError(
                f"Template.templates must be (rows, columns), not {self.templates}"
            )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        by_area = tuple(sorted(self.templates, key=lambda grid: grid[0] * grid[1]))
        grid = nearest_grid(height, width, self.tile, by_area)
        return tiled(height, width, self.tile, grid, self.patch, True)

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        side = self.tile // self.patch
        seen = range(len(self.views(height, width, images=images)))
        return tuple(Block(i, side, side) for i in seen)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """One token a patch, and no separators."""
        return views.count(self.layout(height, width, images=images))


def tiled(
    height: int,
    width: int,
    tile: int,
    grid: tuple[int, int],
    patch: int,
    thumbnail: bool,
) -> tuple[View, ...]:
    """Tiles of the squashed image, and a thumbnail last if there are several."""
    if grid == (1, 1):
        return (views.whole(height, width, (tile, tile), patch),)
    size = (grid[0] * tile, grid[1] * tile)
    cut = views.tiles(height, width, size, (tile, tile), grid, patch)
    if not thumbnail:
        return cut
    return *cut, views.whole(height, width, (tile, tile), patch, "thumbnail")


@functools.cache
def grids_within(fewest: int, most: int) -> Grids:
    """All (rows, columns) of `fewest` to `most` tiles, by their number of tiles.

    Grids of equally many tiles come in the order in which the original's set yields
    them. That decides hardly any size, but it does for (2, 2), (2, 3) and (4, 4).
    """
    by_columns = {
        (columns, rows)
        for tiles in range(fewest, most + 1)
        for columns in range(1, tiles + 1)
        for rows in range(1, tiles + 1)
        if fewest <= columns * rows <= most
    }
    ordered = sorted(by_columns, key=lambda grid: grid[0] * grid[1])
    return tuple((rows, columns) for columns, rows in ordered)


def nearest_grid(height: int, width: int, tile: int, grids: Grids) -> tuple[int, int]:
    """The grid whose aspect is nearest in float64, as `find_closest_aspect_ratio`.

    Among equally near grids, a later one wins if the image has more than half of its
    pixels. Equal distances also join different aspects: 1280x1024 pixels (width x
    height) are as near to 1x1 as to 3x2 tiles.
    """
    aspect, area = width / height, width * height
    best, chosen = float("inf"), (1, 1)
    for rows, columns in grids:
        distance = abs(aspect - columns / rows)
        if distance < best:
            best, chosen = distance, (rows, columns)
        elif distance == best and area > 0.5 * tile * tile * rows * columns:
            chosen = rows, columns
    return chosen
