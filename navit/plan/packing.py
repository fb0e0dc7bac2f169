"""Lengths -> rows, greedily, with few rows open. Knows nothing about images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

# Fewer lengths than this say too little about their distribution.
_ENOUGH = 1000


def pack(
    lengths: Sequence[int],
    row_tokens: int,
    *,
    open_rows: int = 16,
    max_images: int | None = None,
    elastic: float = 0.0,
    shrink: Callable[[int, int, int], int] | None = None,
) -> tuple[list[list[int]], dict[int, int]]:
    """Packs `lengths` in order into rows.

    Each length goes to the open row whose expected waste grows least, given the
    distribution of all lengths. Best fit would take the tightest row; but a row with a
    little room left, too little for any image, is worse than a full one. When no open
    row has room and `open_rows` are open, only the fullest is closed, and the others
    keep waiting for lengths that fit. With few lengths, this is best fit.

    A row is closed as soon as it is full or has `max_images`. The rows still open at
    the end come last.

    Args:
      elastic: the largest share of its length that an image may give up. It does so
        only to enter a row where the waste then grows less than it would with the full
        length in any row.
      shrink: (index, most, least) -> the length that the image would have between
        `least` and `most`, or 0 if it has none there.

    Returns:
      The indices in each row; and for each shortened image, the `most` that `shrink`
      was called with: the same call again gives the image's grid.

    Raises:
      ValueError: if a length is not between 1 and `row_tokens`.
    """
    if not len(lengths):
        return [], {}
    if not 0 < min(lengths) <= max(lengths) <= row_tokens:
        index, length = next(
            (i, x) for i, x in enumerate(lengths) if not 0 < x <= row_tokens
        )
        raise ValueError(
            f"image {index} has {length} tokens, and a row holds 1 to {row_tokens}"
        )
    waste = expected_waste(lengths, row_tokens).tolist()
    new_waste = waste[row_tokens]
    rooms: list[int] = []
    rows: list[list[int]] = []
    closed: list[list[int]] = []
    shrunk: dict[int, int] = {}
    for index, length in enumerate(lengths):
        best, added = 0, math.inf
        for room in rooms:
            if room >= length:
                increase = waste[room - length] - waste[room]
                if increase < added:
                    best, added = room, increase
        may_open = len(rooms) < open_rows
        if elastic and shrink and best != length:
            least = max(1, math.ceil((1 - elastic) * length))
            most = max((room for room in rooms if room < length), default=0)
            shorter = shrink(index, most, least) if most >= least else 0
            if shorter and waste[most - shorter] - waste[most] < added:
                shrunk[index] = most
                length, best, may_open = shorter, most, False
        if not best or (may_open and added > waste[row_tokens - length] - new_waste):
            if not may_open:
                fullest = rooms.index(min(rooms))
                closed.append(rows.pop(fullest))
                del rooms[fullest]
            best = row_tokens
            rooms.append(best)
            rows.append([])
            place = -1
        else:
            place = rooms.index(best)
        row = rows[place]
        row.append(index)
        if best == length or len(row) == max_images:
            closed.append(row)
            del rooms[place], rows[place]
        else:
            rooms[place] = best - length
    return closed + rows, shrunk


def expected_waste(lengths: Sequence[int], row_tokens: int) -> np.ndarray:
    """The expected waste of each room `0..row_tokens`, in arbitrary units.

    The model: the best of the next 12 images enters the room, again and again, until
    none fits. (With 8 or 16 images, packing is about as good; `navit.bench.plan` shows
    the result.) Every machine rounds these operations alike, and the result is rounded,
    so that all hosts plan alike.

    Returns:
      `[row_tokens + 1]` float64.
    """
    if len(lengths) < _ENOUGH:  # rises ever more slowly: the tightest room is best
        return np.sqrt(np.arange(row_tokens + 1))
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)
    chances = counts[values] / len(lengths)
    shortest, longest = int(values[0]), int(values[-1])
    # With more room than this, how a row will end hardly depends on its room.
    reach = min(row_tokens, 3 * longest)
    waste = np.arange(row_tokens + 1, dtype=np.float64)
    # An image makes a room smaller by at least `shortest`. So the waste of the next
    # `shortest` rooms depends only on rooms that are already computed.
    for start in range(shortest, reach + 1, shortest):
        rooms = np.arange(start, min(start + shortest, reach + 1))[:, None]
        fits = values <= rooms
        after = np.where(fits, waste[np.maximum(rooms - values, 0)], np.inf)
        order = np.argsort(after, axis=1, kind="stable")
        after = np.take_along_axis(after, order, 1)
        fits = np.take_along_axis(fits, order, 1)
        # The chance that none of the next 12 is among the best 1, 2, 3, ... images.
        none = 1.0 - np.minimum(np.cumsum(chances[order] * fits, axis=1), 1.0)
        none *= none * none  # 3
        none *= none  # 6
        none *= none  # 12
        best = -np.diff(none, axis=1, prepend=1.0)
        filled = np.cumsum(best * np.where(fits, after, 0.0), axis=1)[:, -1]
        waste[rooms[:, 0]] = filled + none[:, -1] * rooms[:, 0]
    waste[reach:] = waste[reach]
    # The added term is for `elastic`: at equal waste, an image keeps its length.
    return np.round(1000 * waste + np.arange(row_tokens + 1))
