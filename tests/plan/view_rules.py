"""What the restated strategies share: tiles, crops, letterboxes and choices of grid.

All pairs are (height, width) or (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Pair = tuple[int, int]
Shown = tuple[Any, ...]
CLIP_GREY, GREY, BLACK = (122, 116, 104), (127, 127, 127), (0, 0, 0)


def upto(last: int) -> range:
    return range(1, last + 1)


@cache
def grids(fewest: int, most: int) -> list[Pair]:
    """All (rows, columns) of so many cells, fewest cells and then columns first."""
    pairs = [(r, c) for c in upto(most) for r in upto(most)]
    return sorted((p for p in pairs if fewest <= p[0] * p[1] <= most), key=math.prod)


def shown(
    box: Any,
    size: Any,
    window: Any,
    patch: int,
    role: str,
    place: Pair | None = None,
    fill: Any = None,
) -> Shown:
    top, left, bottom, right = window
    grid = ((bottom - top) // patch, (right - left) // patch)
    filled = min(top, left) < 0 or bottom > size[0] or right > size[1]
    return box, size, window, grid, role, place, fill if filled else None


def tiles_of(
    box: Any,
    size: Any,
    canvas: Any,
    tile: Pair,
    patch: int,
    start: Pair = (0, 0),
    fill: Any = None,
) -> list[Shown]:
    """A canvas' tiles row by row, its content pasted at `start`."""
    views = []
    for top in range(0, canvas[0], tile[0]):
        for left in range(0, canvas[1], tile[1]):
            place = (top // tile[0], left // tile[1])
            y, x = top - start[0], left - start[1]
            window = (y, x, y + tile[0], x + tile[1])
            views.append(shown(box, size, window, patch, "tile", place, fill))
    return views


def cropped(
    box: tuple[int, int, int, int],
    side: int,
    patch: int,
    role: str,
    place: Pair | None = None,
) -> Shown:
    """CLIP's processor: the shortest side resized to `side`, and the centre of it."""
    sides = (box[2] - box[0], box[3] - box[1])
    size = tuple(int(side * x / min(sides)) for x in sides)
    top, left = ((x - side) // 2 for x in size)
    window = (top, left, top + side, left + side)
    return shown(box, size, window, patch, role, place)


def roomiest(height: int, width: int, canvases: list[Pair]) -> Pair:
    """The canvas that keeps most pixels, then wastes fewest, then comes first."""

    def worth(canvas: Pair) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, math.prod(canvas) - kept

    return min(canvases, key=worth)


def contained(height: int, width: int, canvas: Any) -> tuple[Pair, Pair]:
    """Size and corner of the content of `PIL.ImageOps.pad`."""
    if width / height > canvas[1] / canvas[0]:
        size = (round(height / width * canvas[1]), canvas[1])
    else:
        size = (canvas[0], round(width / height * canvas[0]))
    if not min(size):
        raise ValueError("the content has no pixels")
    return size, (round((canvas[0] - size[0]) / 2), round((canvas[1] - size[1]) / 2))


def letterbox(height: int, width: int, side: int, patch: int, role: str) -> Shown:
    size, (top, left) = contained(height, width, (side, side))
    window = (-top, -left, side - top, side - left)
    return shown((0, 0, height, width), size, window, patch, role, fill=GREY)


def squashed(
    height: int,
    width: int,
    tile: int,
    patch: int,
    shapes: list[Pair],
    thumbnail: bool = True,
) -> list[Shown]:
    """Tiles of the nearest aspect ratio, and the whole, by InternVL's comparison.

    Of equally near grids the last that the image half fills wins, otherwise the first.
    """
    away = [abs(width / height - c / r) for r, c in shapes]
    nearest = min(away)
    tied = [grid for grid, x in zip(shapes, away, strict=True) if x == nearest]
    area = 2 * height * width
    filled = [grid for grid in tied[1:] if area > tile * tile * math.prod(grid)]
    rows, columns = filled[-1] if filled else tied[0]
    box, side = (0, 0, height, width), (tile, tile)
    whole = shown(box, side, (0, 0, *side), patch, "thumbnail")
    if rows * columns == 1:
        return [(*whole[:4], "whole", *whole[5:])]
    canvas = (rows * tile, columns * tile)
    tiles = tiles_of(box, canvas, canvas, side, patch)
    return [*tiles, whole] if thumbnail else tiles


def sliced(
    height: int, width: int, tile: int, most: int, whole: Callable[[float], int]
) -> tuple[list[Shown], Shown]:
    """The slices and the overview of LLaVA-UHD and MiniCPM-V; one view: no slices.

    Args:
      whole: how a quotient becomes a whole number.
    """

    def divisible(length: float, by: int) -> int:
        return max(whole(length / by), 1) * by

    def fitted(h: float, w: float) -> Pair:
        ratio = w / h
        h = int(tile / math.sqrt(ratio))
        return divisible(h, 14), divisible(int(h * ratio), 14)

    box = (0, 0, height, width)
    ideal = min(math.ceil(height * width / tile**2), most)
    if ideal <= 1:
        size = fitted(height, width)
        return [], shown(box, size, (0, 0, *size), 14, "whole")
    counts = {ideal - 1, ideal, ideal + 1} - {1}
    shapes = [g for g in grids(2, most) if math.prod(g) in counts]
    rows, columns = min(
        shapes, key=lambda g: abs(math.log(width / height) - math.log(g[1] / g[0]))
    )
    part = fitted(divisible(height, rows) / rows, divisible(width, columns) / columns)
    canvas = (rows * part[0], columns * part[1])
    size = fitted(height, width)
    overview = shown(box, size, (0, 0, *size), 14, "thumbnail")
    return tiles_of(box, canvas, canvas, part, 14), overview


def overlap(cells: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Intersection over union of rectangles that share a corner, in float32."""
    shared = np.minimum(cells, sizes).prod(1)
    union = cells.prod(1) + sizes.prod(1) - shared
    return shared.astype(np.float32) / (union.astype(np.float32) + np.float32(1e-5))
