"""Images with several views -> groups of rows, each of which holds whole images.

The vectors of an image's views are averaged, so all of them must lie on one device, in
one group of `data.caption_rows` rows. As in `packing.py`, images come in order, and few
groups are open at a time.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import NamedTuple

import numpy as np

from navit.config import DataConfig
from navit.plan.lanes import rows_in_window
from navit.plan.rows import Rows
from navit.plan.strategies import Strategy
from navit.plan.view_rows import numbers_of, tables_of

# At least this many groups are open, as few of several rows are left with a gap.
_OPEN_GROUPS = 8

# Shapes that are kept from one block to the next.
_KEPT_SHAPES = 2**18


class Shape(NamedTuple):
    """What a strategy makes of every image of one size.

    Attributes:
      views: `numbers_of` its views, in the strategy's order.
      reason: why there are no views: the size is refused, or does not fit.
      order: the views, longest first, as they are placed in rows.
      lengths: their tokens, in that order.
    """

    views: np.ndarray
    reason: str = ""
    order: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


class Room(NamedTuple):
    """The rows that must hold all views of an image.

    Attributes:
      rows: in a group.
      row_tokens: of each.
      slots: the most views in each.
    """

    rows: int
    row_tokens: int
    slots: int


def room_of(data: DataConfig, slots: int | None) -> Room:
    """The rows of a group; without `slots`, a row may hold any number of views."""
    return Room(data.caption_rows or 1, data.row_tokens, slots or data.row_tokens)


def shapes_of(
    sizes: np.ndarray, strategy: Strategy, room: Room
) -> tuple[list[Shape], np.ndarray]:
    """The distinct shapes of images, and which of them each image has, `[m]`.

    Args:
      sizes: `[m, 2]` (height, width) of each image in pixels.
    """
    sizes = np.asarray(sizes, np.int64)
    coded = sizes[:, 0] * 2**32 + sizes[:, 1]
    distinct, which = np.unique(coded, return_inverse=True)
    shapes = [_shape(x // 2**32, x % 2**32, strategy, room) for x in distinct.tolist()]
    return shapes, which


def left_out(shapes: list[Shape], which: np.ndarray) -> np.ndarray:
    """The images that the plan leaves out, `[k]`; takes what `shapes_of` returns."""
    return np.flatnonzero(np.array([bool(x.reason) for x in shapes], bool)[which])


def tokens_of(sizes: np.ndarray, data: DataConfig) -> tuple[float, float]:
    """Mean tokens of an image, and of a view, of those that fit; 1 if none does.

    Args:
      sizes: `[m, 2]` (height, width) of each image in pixels.
    """
    assert data.strategy is not None
    shapes, which = shapes_of(sizes, data.strategy, room_of(data, None))
    tokens = np.array([sum(shape.lengths) for shape in shapes])[which].sum()
    views = np.array([len(shape.lengths) for shape in shapes])[which]
    if not tokens:
        return 1.0, 1.0
    return float(tokens / (views > 0).sum()), float(tokens / views.sum())


def plan_views(
    index: np.ndarray,
    sizes: np.ndarray,
    data: DataConfig,
    *,
    slots: int | None,
    captions: int | None,
    epoch: int,
    rng: np.random.Generator,
) -> Rows:
    """Plans the views of images: groups of `data.caption_rows` rows, in random order.

    Leaves out the images that `left_out` names.

    Args:
      index: `[m]` the images' records, in the order in which they are packed.
      sizes: `[m, 2]` (height, width) of each.
      slots: the most views in a row; None for no cap.
      captions: the most images in a group; None for no cap.
    """
    assert data.strategy is not None
    room = room_of(data, slots)
    shapes, which = shapes_of(sizes, data.strategy, room)
    counts = np.array([len(shape.views) for shape in shapes], np.int64)
    first = np.cumsum(counts) - counts  # of each shape, in `table`
    table, grids = tables_of([shape.views for shape in shapes])
    open_groups = max(_OPEN_GROUPS, data.open_rows // room.rows)
    groups = _packed(shapes, which, room, captions, open_groups)
    window = max(1, len(groups))
    if data.lanes:  # what is read together is used together
        window = rows_in_window(room.rows * window, len(which), data) // room.rows
    order = [
        start + rng.permutation(min(window, len(groups) - start))
        for start in range(0, len(groups), window)
    ]
    numbers = np.concatenate([*order, np.zeros(0, np.int64)]).tolist()
    rows = [row for g in numbers for row in groups[g]]
    offsets = np.cumsum([0, *map(len, rows)])
    # A row lists its segments: (image, view).
    segments = [segment for row in rows for segment in row]
    pairs = np.array(segments, np.int64).reshape(-1, 2)
    places = first[which[pairs[:, 0]]] + pairs[:, 1]
    return Rows(
        offsets,
        np.asarray(index)[pairs[:, 0]],
        grids[places],
        views=table[places],
        epoch=epoch,
    )


class _Group:
    """The rows of a group while it is filled: `rows` lists (image, view) pairs."""

    def __init__(self, room: Room) -> None:
        self.rooms, self.room = [room.row_tokens] * room.rows, math.prod(room[:2])
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(room.rows)]
        self.slots, self.images = room.slots, 0

    def places(self, lengths: tuple[int, ...]) -> list[int] | None:
        """A row for each length, longest first, by best fit; None if one has none."""
        rooms = self.rooms.copy()
        free = [self.slots - len(row) for row in self.rows]
        places = []
        for length in lengths:
            best, least = -1, math.inf
            for row, room in enumerate(rooms):
                if length <= room < least and free[row] > 0:
                    best, least = row, room
            if best < 0:
                return None
            rooms[best] -= length
            free[best] -= 1
            places.append(best)
        return places

    def add(self, image: int, shape: Shape, places: list[int]) -> None:
        for view, length, row in zip(shape.order, shape.lengths, places, strict=True):
            self.rooms[row] -= length
            self.room -= length
            self.rows[row].append((image, view))
        self.images += 1


@functools.lru_cache(_KEPT_SHAPES)
def _shape(height: int, width: int, strategy: Strategy, room: Room) -> Shape:
    nothing = numbers_of(())
    image = f"an image of {width}x{height} pixels (width x height)"
    try:
        views = strategy.views(height, width)
    except ValueError as error:
        return Shape(nothing, str(error))
    tokens = [view.grid[0] * view.grid[1] for view in views]
    order = sorted(range(len(views)), key=lambda k: -tokens[k])
    lengths = tuple(tokens[k] for k in order)
    if lengths[0] > room.row_tokens:
        return Shape(
            nothing,
            f"a view of {image} has {lengths[0]} tokens, more than data.row_tokens="
            f"{room.row_tokens}: raise it",
        )
    fit = min(room.slots, room.row_tokens // lengths[0]) * room.rows  # at least
    if len(lengths) > fit and _Group(room).places(lengths) is None:
        many = len(views) > room.rows * room.slots
        return Shape(
            nothing,
            f"the {len(views)} views of {image} have {sum(tokens)} tokens, and do not "
            f"fit in a group of {room.rows} row{'s' * (room.rows > 1)} of "
            f"{room.row_tokens} tokens and "
            f"{room.slots} slots: raise data.caption_rows"
            f"{', or data.slots' if many else ''}",
        )
    return Shape(numbers_of(views), "", tuple(order), lengths)


def _packed(
    shapes: list[Shape],
    which: np.ndarray,
    room: Room,
    captions: int | None,
    open_groups: int,
) -> list[list[list[tuple[int, int]]]]:
    """Groups of rows of (image, view) pairs.

    An image goes to the fullest open group that holds all its views. If none does and
    no more groups may be open, the fullest is closed.
    """
    most = math.inf if captions is None else captions
    closed: list[_Group] = []
    opened: list[_Group] = []  # the fullest first
    totals = [sum(shape.lengths) for shape in shapes]
    for image, number in enumerate(which.tolist()):
        shape, total = shapes[number], totals[number]
        if not total:
            continue
        found, places = None, None
        for group in opened:
            if group.room >= total:
                places = group.places(shape.lengths)
                if places is not None:
                    found = group
                    break
        if found is None:
            if len(opened) >= open_groups:
                closed.append(opened.pop(0))
            found = _Group(room)
            opened.append(found)
            places = found.places(shape.lengths)
        assert places is not None
        found.add(image, shape, places)
        opened.remove(found)
        if found.images >= most or not found.room:
            closed.append(found)
        else:
            bisect.insort(opened, found, key=_room)
    return [group.rows for group in closed + opened]


def _room(group: _Group) -> int:
    return group.room
