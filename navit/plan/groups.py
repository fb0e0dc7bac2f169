"""Rows -> groups of rows that hold about as many images each, and their captions.

Rows of 1024 tokens hold one image or four, while the text tower needs a fixed number of
captions. So every `data.caption_rows` rows share one list of `data.captions` places.
Like the whole plan, numpy and integers only.
"""

from __future__ import annotations

import math

import numpy as np

from navit.config import DataConfig

# The share of a sample's images that may get no place in a list.
_LEFT_OUT = 2e-4

# At least this many places per mean image, as epochs differ, and samples from epochs.
_HEADROOM = 1.02

# Places are rounded up to a multiple of 8 if that is at most this factor more.
_ROUNDING = 1.04


def host_rows(data: DataConfig, process_count: int) -> int:
    """The number of a global batch's rows on one host.

    Raises:
      ValueError: if the hosts cannot share the rows, or their groups, evenly.
    """
    if data.lanes % process_count:
        raise ValueError(
            f"data.lanes={data.lanes} is not divisible by {process_count} processes: "
            "each has whole lanes"
        )
    rows, over = divmod(data.rows, process_count)
    if over:
        raise ValueError(
            f"data.rows={data.rows} is not divisible by {process_count} processes"
        )
    if rows % (data.caption_rows or 1):
        raise ValueError(
            f"data.rows={data.rows} over {process_count} processes is {rows} rows "
            "each, which is not divisible by data.caption_rows="
            f"{data.caption_rows}: change one of them"
        )
    return rows


def row_order(
    rng: np.random.Generator, counts: np.ndarray, group: int | None
) -> np.ndarray:
    """A random order of rows in which every `group` rows have about as many images.

    The fullest rows go to one group each. Then, round by round, the next fullest rows
    go to the groups with the fewest images. Rows of an incomplete group come last.

    Args:
      counts: `[b]` images in each row.
    """
    order = rng.permutation(len(counts))
    groups = len(counts) // (group or 1)
    if not group or not groups:
        return order
    dealt, rest = order[: groups * group], order[groups * group :]
    dealt = dealt[np.argsort(-counts[dealt], kind="stable")].reshape(group, groups)
    sums = np.zeros(groups, np.int64)
    members = np.empty((groups, group), np.int64)
    for i, rows in enumerate(dealt):
        to = np.argsort(sums, kind="stable")
        members[to, i] = rows
        sums[to] += counts[rows]
    members = rng.permuted(rng.permutation(members), axis=1)
    return np.concatenate([members.ravel(), rest])


def cut(rows: list[list[int]], group: int, captions: int) -> list[list[int]]:
    """Leaves out images of a group's fullest rows until it has `captions` at most."""
    rows, counts = list(rows), np.array([len(row) for row in rows])
    starts = np.arange(0, len(rows), group)
    over = np.add.reduceat(counts, starts) - captions if rows else starts
    for start in starts[over > 0].tolist():
        in_group = counts[start : start + group]
        while in_group.sum() > captions:
            fullest = int(in_group.argmax())
            in_group[fullest] -= 1
            rows[start + fullest] = rows[start + fullest][:-1]
    return rows


def captions_for(counts: np.ndarray, group: int) -> int:
    """The places that a group of rows needs, estimated from a sample of rows.

    The fewest that leave out hardly any image, but a little more than the mean; rounded
    up to a multiple of 8 if that is near.

    Args:
      counts: `[b]` images in each row of the sample.
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
