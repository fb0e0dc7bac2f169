"""The order of an epoch in lanes: chunks of neighbouring records, dealt at random.

A chunk is read in one piece, and a host plans and reads only its own lanes. What a lane
holds is a function of the seed, the epoch and the number of lanes, never of the hosts.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navit.config import DataConfig
from navit.plan.order import ORDER, Part, part_shares, records_at

# A lane plans about this many images at a time.
_BLOCK_IMAGES = 2**16


class Lanes(NamedTuple):
    """How the chunks of an epoch are dealt to lanes.

    Attributes:
      chunks: the chunks of each part of a mixture, or of the whole source.
      records: those parts, in records.
      shares: how many chunks an epoch takes from each part.
      chunk: the mean number of records of the chunks of an epoch.
      window: the chunks of a window.
      windows: windows of chunks in a block of a lane.
    """

    chunks: tuple[Part, ...]
    records: tuple[Part, ...]
    shares: list[int]
    chunk: float
    window: int
    windows: int
    data: DataConfig

    @property
    def total(self) -> int:
        """The chunks of an epoch."""
        return sum(self.shares)

    @property
    def images(self) -> int:
        """The images of an epoch, if all its chunks are full."""
        pairs = zip(self.shares, self.records, strict=True)
        return sum(
            min(round(n * _size(part, self.data)), part.count) for n, part in pairs
        )

    @property
    def block_images(self) -> int:
        """The images in a full block of a lane."""
        return round(self.windows * self.window * self.chunk)

    def blocks(self) -> np.ndarray:
        """The images of each block of an epoch, in all lanes together."""
        chunks = self.windows * self.window * self.data.lanes
        count = max(1, -(-self.total // chunks))
        starts = (np.arange(count) * chunks * self.chunk).astype(np.int64)
        return np.minimum(max(1, self.images) - starts, round(chunks * self.chunk))

    def ranges(self, records: np.ndarray) -> np.ndarray:
        """The first and the last-plus-one record of each record's chunk: `[m, 2]`."""
        found = np.empty((len(records), 2), np.int64)
        for part in self.records:
            within = records - part.offset
            own = (within >= 0) & (within < part.count)
            if part.ends is None:
                number = within[own] // self.data.chunk
            else:
                number = np.searchsorted(part.ends, within[own], "right")
            found[own] = self._range(part, number)
        return found

    def order(self, epoch: int, block: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """A block of a lane, in the order in which it is packed.

        Returns:
          `[m]` records, and `[m]` images of the run that come before each.
        """
        data = self.data
        turn, position, ranges = self._dealt(epoch, block, lane)
        first, held = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
        starts = np.repeat(np.cumsum(held) - held, held)
        records = np.repeat(first, held) + np.arange(held.sum()) - starts
        rng = np.random.default_rng([data.seed, epoch, ORDER, block, lane + 1])
        window = np.repeat(turn // self.window, held)
        shuffled = np.lexsort((rng.random(len(records)), window))
        before = np.repeat((position * self.chunk).astype(np.int64), held)
        return records[shuffled], epoch * self.images + before[shuffled]

    def least(self, block: int, lane: int) -> float:
        """The fewest images that a lane has in a block, as a share of those of `lane`.

        Looks at epoch 0. Without ends of their own, chunks are full, and it is 1.
        """
        if all(part.ends is None for part in self.records):
            return 1.0
        held = [
            int(np.diff(self._dealt(0, block, other)[2]).sum())
            for other in range(self.data.lanes)
        ]
        return min(held) / max(1, held[lane])

    def _dealt(
        self, epoch: int, block: int, lane: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunks of a block of a lane, in their order.

        Returns:
          `[m]` turns of the lane, `[m]` places in the epoch, and `[m, 2]` ranges of
          records.
        """
        size = self.windows * self.window
        turn = np.arange(block * size, (block + 1) * size)
        position = turn * self.data.lanes + lane
        turn, position = turn[position < self.total], position[position < self.total]
        key = [self.data.seed, epoch, ORDER]
        chunk = records_at(position, self.chunks, self.shares, key)
        ranges = np.empty((len(chunk), 2), np.int64)
        for chunks, part in zip(self.chunks, self.records, strict=True):
            number = chunk - chunks.offset
            own = (number >= 0) & (number < chunks.count)
            ranges[own] = self._range(part, number[own])
        return turn, position, ranges

    def _range(self, part: Part, number: np.ndarray) -> np.ndarray:
        """The first and the last-plus-one record of chunks of a part: `[m, 2]`."""
        edges = np.stack([number, number + 1], -1)
        if part.ends is None:
            return part.offset + np.minimum(edges * self.data.chunk, part.count)
        return part.offset + np.where(edges > 0, part.ends[edges - 1], 0)


def lanes_of(data: DataConfig, parts: Sequence[Part], count: int) -> Lanes:
    """Divides a source of `count` records into chunks.

    Args:
      parts: the parts of a mixture, or one whose chunks have ends of their own; empty
        for one source otherwise.
    """
    records = tuple(parts) or (Part(0, count, 1.0),)
    counts = [
        -(-part.count // data.chunk) if part.ends is None else len(part.ends)
        for part in records
    ]
    offsets = np.cumsum([0, *counts[:-1]]).tolist()
    # A part of small chunks gives more of them.
    chunks = tuple(
        Part(offset, n, part.weight * (data.chunk / _size(part, data)))
        for offset, n, part in zip(offsets, counts, records, strict=True)
    )
    shares = part_shares(chunks if parts else (), sum(counts))
    taken = sum(n * _size(part, data) for n, part in zip(shares, records, strict=True))
    chunk = taken / max(1, sum(shares))
    window = max(1, round(data.window * data.chunk / chunk))
    windows = max(1, round(_BLOCK_IMAGES / (window * chunk)))
    return Lanes(chunks, records, shares, chunk, window, windows, data)


def chunk_ends(groups: np.ndarray, data: DataConfig) -> np.ndarray:
    """Ends of chunks of whole groups.

    A chunk is as many neighbouring groups as fit in `data.chunk` records, or one larger
    group.

    Args:
      groups: `[g]` records up to the end of each group that is read in one piece.

    Returns:
      `[c]` int64, the records up to the end of each chunk.

    Raises:
      ValueError: if a group does not fit in a window, as a lane holds whole windows.
    """
    groups = groups[np.diff(groups, prepend=0) > 0]
    largest, held = int(np.diff(groups, prepend=0).max()), data.window * data.chunk
    if largest > held:
        raise ValueError(
            f"a group of {largest} records, which are read in one piece, does not fit "
            f"the {held} of a lane's window (data.window={data.window} x data.chunk="
            f"{data.chunk}): write smaller groups (row_group_size=64 in Parquet), or "
            f"set data.window={-(-largest // data.chunk)}, which takes more memory"
        )
    # The group after the chunk that would begin with each.
    starts = np.concatenate([[0], groups[:-1]])
    following = np.searchsorted(groups, starts + data.chunk, "right")
    np.maximum(following, np.arange(1, len(groups) + 1), out=following)
    last, group, items = array.array("q"), 0, memoryview(following)
    while group < len(groups):
        group = items[group]
        last.append(group - 1)
    return groups[np.array(last)]


def rows_in_window(rows: int, images: int, data: DataConfig) -> int:
    """The rows that hold as many images as a window: whole groups of rows.

    Args:
      rows, images: of a block of a lane.
    """
    group = data.caption_rows or 1
    count = rows * data.window * data.chunk / max(1, images)
    return max(1, round(count / group)) * group


def _size(part: Part, data: DataConfig) -> float:
    """The mean number of records of a part's full chunks."""
    return float(data.chunk) if part.ends is None else part.count / len(part.ends)
