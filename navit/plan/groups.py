"""Rows -> groups of rows that hold about as many images each, and their captions.

Rows of 1024 tokens hold one image or four, and the text tower needs a fixed number of
captions. So it takes one list for each `data.caption_rows` rows, of `data.captions`
places. numpy and integers only, as the plan.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from navit.config import DataConfig

Image = TypeVar("Image")

# Of the images so many may not find a place in the lists of an epoch's sample.
_LEFT_OUT = 2e-4

# Epochs differ, and a sample from the whole: places beyond the mean.
_HEADROOM = 1.02

# So many more places are worth it where they make a multiple of 8.
_ROUNDING = 1.04


def host_rows(data: DataConfig, process_count: int) -> int:
    """The rows of a global batch that one host has.

    Raises:
      ValueError: if the hosts cannot share the rows, or their groups, evenly.
    """
    rows, over = divmod(data.rows, process_count)
    if over:
        raise ValueError(
            f"data.rows={data.rows} is not divisible by {process_count} processes"
        )
    if rows % (data.caption_rows or 1):
        raise ValueError(
            f"data.rows={data.rows} over {process_count} processes are {rows} rows "
            "each, which is no whole number of groups of data.caption_rows="
            f"{data.caption_rows}: change one of them"
        )
    return rows


def row_order(
    rng: np.random.Generator, counts: np.ndarray, group: int | None
) -> np.ndarray:
    """A random order of rows of so many images, balanced in every `group` of them.

    The fullest rows go to a group each, then, round by round, the next fullest to the
    groups that have least. The rows that make no whole group come last.
    """
    order = rng.permutation(len(counts))
    groups = len(counts) // (group or 1)
    if not group or not groups:
        return order
    dealt, rest = order[: groups * group], order[groups * group :]
    dealt = dealt[np.argsort(-counts[dealt], kind="stable")].reshape(group, groups)
    sums = np.zeros(groups, np.int64)
    found = np.empty((groups, group), np.int64)
    for i, rows in enumerate(dealt):
        to = np.argsort(sums, kind="stable")
        found[to, i] = rows
        sums[to] += counts[rows]
    found = rng.permuted(rng.permutation(found), axis=1)
    return np.concatenate([found.ravel(), rest])


def cut(rows: list[list[Image]], group: int, captions: int) -> list[list[Image]]:
    """Leaves out images of the fullest rows where a group has more than `captions`."""
    rows, counts = list(rows), np.array([len(row) for row in rows])
    starts = np.arange(0, len(rows), group)
    over = np.add.reduceat(counts, starts) - captions if rows else starts
    for start in starts[over > 0].tolist():
        mine = counts[start : start + group]
        while mine.sum() > captions:
            fullest = int(mine.argmax())
            mine[fullest] -= 1
            rows[start + fullest] = rows[start + fullest][:-1]
    return rows


def captions_for(counts: np.ndarray, group: int) -> int:
    """Places that groups of rows of so many images need, by a sample of rows.

    As few as leave out hardly any image, yet a little more than the mean; a multiple of
    8 where that is near.
    """
    rng = np.random.default_rng(0)
    order = row_order(rng, counts, group)
    sums = np.add.reduceat(counts[order], np.arange(0, len(counts), group))
    places = np.arange(sums.max() + 1)
    over = np.maximum(sums[:, None] - places, 0).sum(0)
    enough = int(np.argmax(over <= _LEFT_OUT * counts.sum()))
    enough = max(enough, math.ceil(_HEADROOM * counts.mean() * group))
    even = -(-enough // 8) * 8
    return even if even <= _ROUNDING * enough else enough
