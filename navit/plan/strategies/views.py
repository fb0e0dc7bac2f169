"""A view is what the encoder sees of an image; a strategy turns a size into views.

All pairs are (height, width) or (rows, columns), in pixels of the upright image.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

Box = tuple[int, int, int, int]
BLACK = (0, 0, 0)


class View(NamedTuple):
    """One encoder input.

    Attributes:
      box: (top, left, bottom, right) of the original that is read.
      size: (height, width) that the box is resized to; tiles of one canvas share it.
      window: (top, left, bottom, right) of the resized box that this view shows. Where
        it extends beyond the resized box, the view shows `fill`.
      grid: (rows, columns) of patches; pixels below or right of the last whole patch
        are not encoded.
      role: "whole" if this view alone shows the image, "thumbnail" if it shows the
        image beside its tiles.
      place: (row, column) of a tile; None for other roles.
      fill: RGB beyond the image; None if there is nothing to fill.
    """

    box: Box
    size: tuple[int, int]
    window: Box
    grid: tuple[int, int]
    role: Literal["whole", "thumbnail", "tile", "frame"]
    place: tuple[int, int] | None = None
    fill: tuple[int, int, int] | None = None

    def valid(self, patch: int) -> np.ndarray:
        """`[rows, columns]` bool: which patches show a pixel of the image.

        The others are filler, which the original models attend to like any token.
        """
        inside, content = [], self.content
        for axis in (0, 1):
            starts = self.window[axis] + patch * np.arange(self.grid[axis])
            inside.append(
                (starts + patch > content[axis]) & (starts < content[axis + 2])
            )
        return inside[0][:, None] & inside[1]

    @property
    def content(self) -> Box:
        """The part of the window that shows the image, in the window's coordinates.

        It is empty for a tile that is all filler.
        """
        return _content(self.window, self.size)


class Block(NamedTuple):
    """A map of tokens in the language model's order, row by row.

    Attributes:
      view: index of the view that it comes from; None for the map of all tiles, put
        together as they lie in the image.
      newlines: whether each row ends in a newline token.
    """

    view: int | None
    rows: int
    columns: int
    newlines: bool = False


class Separator(NamedTuple):
    """One token of its own, such as "newline"."""

    name: str


Layout = tuple[Block | Separator, ...]


def count(layout: Layout) -> int:
    """The number of tokens in a layout."""
    return sum(
        part.rows * (part.columns + part.newlines) if isinstance(part, Block) else 1
        for part in layout
    )


def check(height: int, width: int, images: int = 1) -> None:
    """Raises ValueError if a size or a number of images is below 1."""
    if min(height, width) < 1:
        raise ValueError(f"an image of {height}x{width} pixels has no views")
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")


def check_patch(strategy: Any, patch_size: int) -> None:
    """Raises ValueError if a model takes patches of another size.

    Args:
      patch_size: the model's.
    """
    kind = type(strategy).__name__
    if strategy.patch != patch_size:
        raise ValueError(
            f"{kind} cuts patches of {strategy.patch} pixels, and the model takes "
            f"{patch_size}: pass {kind}(patch={patch_size}), or in a config "
            f"data.strategy.patch={patch_size}"
        )


def check_fields(strategy: object, *names: str) -> None:
    """Raises ValueError unless each of these fields is a whole number above 0."""
    for name in names:
        value = getattr(strategy, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            kind = type(strategy).__name__
            raise ValueError(f"{kind}.{name} must be a whole number above 0: {value!r}")


def check_sides(strategy: Any, *names: str) -> None:
    """Raises ValueError if a view with one of these sides would have no token."""
    token = strategy.patch * getattr(strategy, "merge", 1)
    for name in names:
        side, kind = getattr(strategy, name), type(strategy).__name__
        if side < token:
            raise ValueError(
                f"{kind}.{name}={side} is less than the {token} pixels of one token: "
                f"raise {name}, or lower patch"
            )


def whole(
    height: int,
    width: int,
    size: tuple[int, int],
    patch: int,
    role: Literal["whole", "thumbnail"] = "whole",
) -> View:
    """The whole image, resized to `size` without regard to its aspect."""
    return View(
        box=(0, 0, height, width),
        size=size,
        window=(0, 0, *size),
        grid=(size[0] // patch, size[1] // patch),
        role=role,
    )


def tiles(
    height: int,
    width: int,
    size: tuple[int, int],
    tile: tuple[int, int],
    counts: tuple[int, int],
    patch: int,
    *,
    offset: tuple[int, int] = (0, 0),
    fill: tuple[int, int, int] | None = None,
) -> tuple[View, ...]:
    """Cuts a canvas into tiles, row by row.

    Args:
      size: what the image is resized to.
      tile: (height, width) of a tile.
      counts: (rows, columns) of tiles.
      offset: where the resized image lies on the canvas of all tiles.
    """
    box, grid = (0, 0, height, width), (tile[0] // patch, tile[1] // patch)
    cut = []
    for row in range(counts[0]):
        top = row * tile[0] - offset[0]
        for column in range(counts[1]):
            left = column * tile[1] - offset[1]
            window = (top, left, top + tile[0], left + tile[1])
            seen = None if _content(window, size) == window else fill
            cut.append(View(box, size, window, grid, "tile", (row, column), seen))
    return tuple(cut)


def _content(window: Box, size: tuple[int, int]) -> Box:
    top, left = max(0, window[0]), max(0, window[1])
    bottom, right = min(window[2], size[0]), min(window[3], size[1])
    return top, left, max(top, bottom), max(left, right)


def padded(
    height: int,
    width: int,
    canvas: tuple[int, int],
    patch: int,
    fill: tuple[int, int, int],
    role: Literal["whole", "thumbnail"] = "whole",
) -> View:
    """The whole image in the middle of a canvas, as Pillow's `ImageOps.pad`."""
    size, offset = contained(height, width, canvas)
    top, left = -offset[0], -offset[1]
    return View(
        box=(0, 0, height, width),
        size=size,
        window=(top, left, top + canvas[0], left + canvas[1]),
        grid=(canvas[0] // patch, canvas[1] // patch),
        role=role,
        fill=None if size == canvas else fill,
    )


def contained(
    height: int, width: int, canvas: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(size, offset) of an image in the middle of a canvas (Pillow's `ImageOps.pad`).

    The shorter side is rounded half to even, and so is the offset.

    Raises:
      ValueError: if the shorter side is rounded to 0.
    """
    high, wide = canvas
    aspect, needed = width / height, wide / high
    size = canvas
    if aspect > needed:
        size = (round(height / width * wide), wide)
    elif aspect < needed:
        size = (high, round(width / height * high))
    if not min(size):
        raise ValueError(
            f"nothing is left of an image of {height}x{width} pixels on a canvas of "
            f"{high}x{wide}: crop it, or leave it out"
        )
    if size[1] != wide:
        return size, (0, round((wide - size[1]) * 0.5))
    return size, (round((high - size[0]) * 0.5), 0)
