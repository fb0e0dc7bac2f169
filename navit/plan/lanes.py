"""The order of an epoch in lanes: chunks of neighbouring records, dealt at random.

A chunk is read in one piece, and a host plans and reads only its own lanes. What a lane
holds is a function of the seed, the epoch and the number of lanes, never of the hosts.
"""

from __future__ import annotations

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
      windows: windows of chunks in a block of a lane.
    """

    chunks: tuple[Part, ...]
    records: tuple[Part, ...]
    shares: list[int]
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
        return sum(min(n * self.data.chunk, part.count) for n, part in pairs)

    @property
    def block_images(self) -> int:
        """The images in a full block of a lane."""
        return self.windows * self.data.window * self.data.chunk

    def blocks(self) -> np.ndarray:
        """The images of each block of an epoch, in all lanes together."""
        size = self.block_images * self.data.lanes
        starts = np.arange(max(1, -(-self.total * self.data.chunk // size))) * size
        return np.minimum(max(1, self.images) - starts, size)

    def ranges(self, records: np.ndarray) -> np.ndarray:
        """The first and the last-plus-one record of each record's chunk: `[m, 2]`."""
        offsets = np.array([part.offset for part in self.records])
        ends = offsets + [part.count for part in self.records]
        part = np.searchsorted(offsets, records, "right") - 1
        within = (records - offsets[part]) // self.data.chunk * self.data.chunk
        start = offsets[part] + within
        return np.stack([start, np.minimum(start + self.data.chunk, ends[part])], -1)

    def order(self, epoch: int, block: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """A block of a lane, in the order in which it is packed.

        Returns:
          `[m]` records, and `[m]` images of the run that come before each.
        """
        data = self.data
        size = self.windows * data.window
        turn = np.arange(block * size, (block + 1) * size)
        position = turn * data.lanes + lane
        turn, position = turn[position < self.total], position[position < self.total]
        key = [data.seed, epoch, ORDER]
        chunk = records_at(position, self.chunks, self.shares, key)
        part = np.searchsorted([x.offset for x in self.chunks], chunk, "right") - 1
        offset = np.array([x.offset for x in self.records])[part]
        count = np.array([x.count for x in self.records])[part]
        first = (chunk - np.array([x.offset for x in self.chunks])[part]) * data.chunk
        held = np.minimum(data.chunk, count - first)
        starts = np.repeat(np.cumsum(held) - held, held)
        records = np.repeat(offset + first, held) + np.arange(held.sum()) - starts
        rng = np.random.default_rng([*key, block, lane + 1])
        window = np.repeat(turn // data.window, held)
        shuffled = np.lexsort((rng.random(len(records)), window))
        before = np.repeat(position, held) * data.chunk
        return records[shuffled], epoch * self.images + before[shuffled]


def lanes_of(data: DataConfig, parts: Sequence[Part], count: int) -> Lanes:
    """Divides a source of `count` records into chunks.

    Args:
      parts: the parts of a mixture; empty for one source.
    """
    records = tuple(parts) or (Part(0, count, 1.0),)
    counts = [-(-part.count // data.chunk) for part in records]
    offsets = np.cumsum([0, *counts[:-1]]).tolist()
    chunks = tuple(
        Part(offset, n, part.weight)
        for offset, n, part in zip(offsets, counts, records, strict=True)
    )
    shares = part_shares(chunks if parts else (), sum(counts))
    windows = max(1, round(_BLOCK_IMAGES / (data.window * data.chunk)))
    return Lanes(chunks, records, shares, windows, data)


def rows_in_window(rows: int, images: int, data: DataConfig) -> int:
    """The rows that hold as many images as a window: whole groups of rows.

    Args:
      rows, images: of a block of a lane.
    """
    group = data.caption_rows or 1
    count = rows * data.window * data.chunk / max(1, images)
    return max(1, round(count / group)) * group
