"""Images with several views -> groups of rows, each of which holds whole images.

The vectors of an image's views are averaged, so all of them must lie on one device, in
one group of `data.caption_rows` rows. As in `packing.py`, images come in order, and few
groups are open at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from navit.config import DataConfig
from navit.plan.lanes import rows_in_window
from navit.plan.rows import Rows
from navit.plan.strategies import View
from navit.plan.view_rows import grids_of, table_of


class Shape(NamedTuple):
    """What a strategy makes of every image of one size.

    Attributes:
      views: in the strategy's order; empty if it refuses the size, or does not fit.
      reason: why there are none.
      order: the views, longest first, as they are placed in rows.
      lengths: their tokens, in that order.
    """

    views: tuple[View, ...]
    reason: str = ""
    order: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


def shapes_of(
    sizes: np.ndarray, data: DataConfig, *, slots: int | None = None
) -> tuple[list[Shape], np.ndarray]:
    """The distinct shapes of images, and which of them each image has, `[m]`.

    Args:
      sizes: `[m, 2]` (height, width) of each image in pixels.
      slots: the most views in a row; None for no cap.
    """
    distinct, which = np.unique(np.asarray(sizes), axis=0, return_inverse=True)
    shapes = [_shape(height, width, data, slots) for height, width in distinct.tolist()]
    return shapes, which.reshape(-1)


def unfit(shapes: list[Shape], which: np.ndarray) -> np.ndarray:
    """The images that the plan leaves out, `[k]`; takes what `shapes_of` returns."""
    return np.flatnonzero(np.array([not shape.views for shape in shapes], bool)[which])


def tokens_of(sizes: np.ndarray, data: DataConfig) -> tuple[float, float]:
    """Mean tokens of an image, and of a view, of those that fit; 1 if none does.

    Args:
      sizes: `[m, 2]` (height, width) of each image in pixels.
    """
    shapes, which = shapes_of(sizes, data)
    fitting = np.array([bool(shape.views) for shape in shapes], bool)[which]
    tokens = np.array([sum(shape.lengths) for shape in shapes])[which][fitting]
    views = np.array([len(shape.views) for shape in shapes])[which][fitting]
    if not len(tokens):
        return 1.0, 1.0
    return float(tokens.mean()), float(tokens.sum() / views.sum())


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

    Leaves out the images that `unfit` names.

    Args:
      index: `[m]` the images' records, in the order in which they are packed.
      sizes: `[m, 2]` (height, width) of each.
      slots: the most views in a row; None for no cap.
      captions: the most images in a group; None for no cap.
    """
    shapes, which = shapes_of(sizes, data, slots=slots)
    counts = np.array([len(shape.views) for shape in shapes])
    first = np.cumsum(counts) - counts  # of each shape, in `table`
    views = [view for shape in shapes for view in shape.views]
    table, grids = table_of([shape.views for shape in shapes]), grids_of(views)
    open_groups = max(2, data.open_rows // (data.caption_rows or 1))
    groups = _packed(shapes, which, data, slots, captions, open_groups)
    # A segment is (image, view); a row lists its segments.
    window, size = max(1, len(groups)), data.caption_rows or 1
    if data.lanes:  # what is read together is used together
        window = rows_in_window(size * window, len(which), data) // size
    order = [
        start + rng.permutation(min(window, len(groups) - start))
        for start in range(0, len(groups), window)
    ]
    numbers = np.concatenate([*order, np.zeros(0, np.int64)]).tolist()
    rows = [row for g in numbers for row in groups[g]]
    offsets = np.cumsum([0, *map(len, rows)])
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

    def __init__(self, rows: int, row_tokens: int, slots: int | None) -> None:
        self.rooms, self.images = [row_tokens] * rows, 0
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        self.slots = math.inf if slots is None else slots

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
            self.rows[row].append((image, view))
        self.images += 1


def _shape(height: int, width: int, data: DataConfig, slots: int | None) -> Shape:
    assert data.strategy is not None
    try:
        views = data.strategy.views(height, width)
    except ValueError as error:
        return Shape((), str(error))
    tokens = [view.grid[0] * view.grid[1] for view in views]
    order = sorted(range(len(views)), key=lambda k: -tokens[k])
    lengths = tuple(tokens[k] for k in order)
    if lengths[0] > data.row_tokens:
        return Shape(
            (),
            f"a view of {height}x{width} pixels has {lengths[0]} tokens, more than "
            f"data.row_tokens={data.row_tokens}",
        )
    group = data.caption_rows or 1
    if _Group(group, data.row_tokens, slots).places(lengths) is None:
        return Shape(
            (),
            f"the {len(views)} views of {height}x{width} pixels have {sum(tokens)} "
            f"tokens, which do not fit in {group} rows of {data.row_tokens} tokens and "
            f"{slots} slots: raise data.caption_rows",
        )
    return Shape(views, "", tuple(order), lengths)


def _packed(
    shapes: list[Shape],
    which: np.ndarray,
    data: DataConfig,
    slots: int | None,
    captions: int | None,
    open_groups: int,
) -> list[list[list[tuple[int, int]]]]:
    """Groups of rows of (image, view) pairs.

    An image goes to the fullest open group that holds all its views. If none does and
    no more groups may be open, the fullest is closed.
    """
    most = math.inf if captions is None else captions
    size, opened = data.caption_rows or 1, list[_Group]()
    closed: list[_Group] = []
    for image, number in enumerate(which.tolist()):
        shape = shapes[number]
        if not shape.views:
            continue
        opened.sort(key=lambda group: sum(group.rooms))
        fits = ((group, group.places(shape.lengths)) for group in opened)
        group, places = next(((g, p) for g, p in fits if p is not None), (None, None))
        if group is None:
            if len(opened) >= open_groups:
                closed.append(opened.pop(0))
            group = _Group(size, data.row_tokens, slots)
            opened.append(group)
            places = group.places(shape.lengths)
        assert places is not None
        group.add(image, shape, places)
        if group.images >= most or not any(group.rooms):
            opened.remove(group)
            closed.append(group)
    return [group.rows for group in closed + opened]
