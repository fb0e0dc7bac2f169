"""(sizes, seed, epoch) -> which image, at what grid, in which row: integers only.

An image's token count follows from its size and from draws made here, so rows are
packed before any pixel is read. Every host makes the same plan and reads its own rows
of it. An epoch is planned in blocks, so that a long one needs neither hours nor memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from navit.config import DataConfig
from navit.plan import geometry, groups, packing, sampling

# Raised when the same config would give other rows; a run does not resume across it.
VERSION = 4

# What a random key is for, so that no two draws share one; the pipeline's are others.
# From 1, as numpy ignores zeros at a key's end.
ORDER, _DRAWS = 1, 2

# A block holds this many images, and this many global batches at least.
_BLOCK_IMAGES, _BLOCK_BATCHES = 2**18, 64


@dataclasses.dataclass(frozen=True)
class Rows:
    """Planned rows: row r holds images `index[offsets[r]:offsets[r+1]]`, slot by slot.

    Attributes:
      offsets: `[rows + 1]` int64.
      index: `[m]` int64 record in the source.
      grids: `[m, 2]` int32 (rows, columns) of patches.
      kept: `[m]` int64 tokens kept of each image; None keeps all.
      boxes: `[m, 4]` int32 (top, left, height, width) of the part of each image that
        is seen, in upright pixels; None sees all.
      flips: `[m]` bool, mirrored left to right; None mirrors none.
      epoch: which epoch they belong to; draws that leave the plan as it is (the choice
        among several captions) depend on it.
    """

    offsets: np.ndarray
    index: np.ndarray
    grids: np.ndarray
    kept: np.ndarray | None = None
    boxes: np.ndarray | None = None
    flips: np.ndarray | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`[m]` tokens that each image takes."""
        return self.grids.prod(-1) if self.kept is None else self.kept

    def slice(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`; those past the end come out empty."""
        offsets = self.offsets[np.minimum(np.arange(start, stop + 1), len(self))]
        return self._with(offsets - offsets[0], slice(offsets[0], offsets[-1]))

    def _with(self, offsets: np.ndarray, images: Any) -> Rows:
        """Other rows of these images (a slice or indices)."""

        def of(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[images]

        return Rows(
            offsets,
            self.index[images],
            self.grids[images],
            of(self.kept),
            of(self.boxes),
            of(self.flips),
            self.epoch,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Records `offset` to `offset + count` of a mixture, and their share of it."""

    offset: int
    count: int
    weight: float


def pack_rows(grids: np.ndarray, row_tokens: int, slots: int | None) -> Rows:
    """Packs images, given in order by their grids `[m, 2]`, into rows."""
    rows, _ = packing.pack(grids.prod(-1).tolist(), row_tokens, max_images=slots)
    return Rows(np.arange(1), np.arange(len(grids)), grids)._with(*_flat(rows))


def plan_block(
    sizes: np.ndarray,
    data: DataConfig,
    *,
    patch_size: int,
    epoch: int,
    block: int = 0,
    parts: Sequence[Part] = (),
    slots: int | None = None,
    captions: int | None = None,
    block_images: int | None = None,
) -> Rows:
    """Plans one block of an epoch: a pure function of its arguments.

    Takes the block's stretch of a random order of all images, draws a token budget
    (and a crop, a flip, the tokens to keep) for each, finds its grid, packs, and
    shuffles the rows; with `budget_per="batch"`, the batches. Rows lie in groups of
    `data.caption_rows` that hold about as many images each.

    Args:
      sizes: `[m, 2]` (height, width) of every image in pixels.
      parts: of a mixture, which is drawn by weight; empty takes every image once.
      slots: images that a row may hold; None for no cap.
      captions: images that a group of rows may hold; what it has beyond is left out.
      block_images: how many a block takes; None finds it from the sizes.
    """
    shares = part_shares(parts, len(sizes))
    total, size = sum(shares), block_images or images_per_block(sizes, data, patch_size)
    first = block * size
    positions = np.arange(first, min(first + size, total))
    index = records_at(positions, parts, shares, [data.seed, epoch, ORDER])
    rng = np.random.default_rng([data.seed, epoch, _DRAWS, block])

    budgets = sampling.token_budgets(rng, len(index), data, patch_size)
    drawn = draw(
        rng,
        sizes[index],
        budgets,
        data,
        patch_size=patch_size,
        seen=epoch * total + positions,
    )
    grids, kept, lengths = drawn.grids, drawn.kept, drawn.lengths
    seen = sizes[index] if drawn.boxes is None else drawn.boxes[:, 2:]

    def smaller(image: int, most: int) -> tuple[int, int]:
        return geometry.grid_for(
            *seen[image].tolist(), patch_size=patch_size, max_tokens=most
        )

    def shrink(image: int, most: int, least: int) -> int:
        if kept is not None:
            return most
        rows, columns = smaller(image, most)
        return rows * columns if rows * columns >= max(least, data.min_tokens) else 0

    def pack(which: np.ndarray) -> list[list[int]]:
        numbers = which.tolist()
        found, shrunk = packing.pack(
            lengths[which].tolist(),
            data.row_tokens,
            open_rows=data.open_rows,
            max_images=slots,
            elastic=data.elastic,
            shrink=lambda i, most, least: shrink(numbers[i], most, least),
        )
        for i, most in shrunk.items():
            if kept is not None:
                kept[numbers[i]] = most
            else:
                grids[numbers[i]] = smaller(numbers[i], most)
        return [[numbers[i] for i in row] for row in found]

    if data.budget_per == "image":
        rows = pack(np.arange(len(index)))
        rows = _shuffled(rng, rows, data)
    else:
        batches = [
            batch
            for budget in sorted(set(data.budgets))
            for batch in _batches(
                rng, pack(np.flatnonzero(budgets == budget)), data, fill=total <= size
            )
        ]
        rows = [row for b in rng.permutation(len(batches)) for row in batches[b]]
    drawn = dataclasses.replace(drawn, index=index, epoch=epoch)
    if captions is not None and data.caption_rows:
        rows = groups.cut(rows, data.caption_rows, captions)
    return drawn._with(*_flat(rows))


def draw(
    rng: np.random.Generator,
    sizes: np.ndarray,
    budgets: np.ndarray,
    data: DataConfig,
    *,
    patch_size: int,
    seen: np.ndarray,
) -> Rows:
    """Crop, flip, grid and tokens to keep of images that are in no row yet.

    Args:
      sizes, budgets: `[m, 2]` and `[m]`, of each image.
      seen: how many images were trained on before each.
    """
    boxes = flips = kept = None
    if data.crop is not None:
        boxes = sampling.crop_boxes(rng, sizes, data.crop)
        sizes = boxes[:, 2:]
    if data.flip:
        flips = rng.random(len(sizes)) < 0.5
    grids = grids_of(sizes, budgets, data, patch_size)
    if data.drop is not None:
        kept = sampling.kept_tokens(
            rng,
            grids.prod(-1),
            data.drop,
            seen=seen,
            longest=data.most_tokens(patch_size),
        )
    return Rows(np.arange(1), np.arange(len(sizes)), grids, kept, boxes, flips)


def grids_of(
    sizes: np.ndarray, budgets: np.ndarray | int, data: DataConfig, patch_size: int
) -> np.ndarray:
    """The grid of every image at its budget, as the config says; int32 `[m, 2]`."""
    grids = geometry.grids_for(
        sizes, budgets, patch_size=patch_size, max_upscale=data.max_upscale
    )
    small = np.flatnonzero(grids.prod(-1) < data.min_tokens)
    if data.max_upscale is not None and small.size:
        grids[small] = geometry.grids_for(
            sizes[small],
            np.minimum(data.min_tokens, np.broadcast_to(budgets, len(sizes))[small]),
            patch_size=patch_size,
        )
    return grids


def typical_tokens(
    sizes: np.ndarray,
    data: DataConfig,
    patch_size: int,
    *,
    count: int,
    seen: float = 1.0,
) -> float:
    """What an image takes on average, by so many of them, evenly spaced.

    Args:
      seen: the share of each side that a crop leaves.
    """
    some = np.maximum(1, sizes[:: max(1, len(sizes) // count)] * seen)
    rng = np.random.default_rng(0)
    budgets = sampling.token_budgets(rng, len(some), data, patch_size)
    return float(grids_of(some, budgets, data, patch_size).prod(-1).mean())


def mean_tokens(sizes: np.ndarray, data: DataConfig, patch_size: int) -> float:
    """What an image takes on average, at the end of the schedule of dropped tokens."""
    seen = float(np.mean(data.crop.area)) ** 0.5 if data.crop else 1.0
    mean = typical_tokens(sizes, data, patch_size, count=10_000, seen=seen)
    return max(1.0, mean * (1 - data.drop.last_rate if data.drop else 1))


def images_per_block(sizes: np.ndarray, data: DataConfig, patch_size: int) -> int:
    if len(sizes) <= _BLOCK_IMAGES:
        return _BLOCK_IMAGES
    mean = mean_tokens(sizes, data, patch_size)
    batch = round(data.rows * data.row_tokens / mean)
    return max(_BLOCK_IMAGES, _BLOCK_BATCHES * batch)


def part_shares(parts: Sequence[Part], count: int) -> list[int]:
    """How many images an epoch takes of each part: as many as the scarcest allows."""
    if not parts:
        return [count]
    total = sum(part.weight for part in parts)
    least = min(part.count * total / part.weight for part in parts)
    shares = [
        min(part.count, int(least * part.weight / total + 1e-6)) for part in parts
    ]
    if 0 in shares:
        i = shares.index(0)
        raise ValueError(
            f"source {i} of the mixture has weight {parts[i].weight:g} of {total:g}, "
            f"which is no image of an epoch of {sum(shares)}: raise its weight"
        )
    return shares


def records_at(
    positions: np.ndarray, parts: Sequence[Part], shares: list[int], key: list[int]
) -> np.ndarray:
    """Which record stands at each position of an epoch's order."""
    found = sampling.shuffled(positions, sum(shares), [*key, 1])
    records = found.copy()
    ends = np.cumsum(shares)
    for i, part in enumerate(parts):
        mine = (found >= ends[i] - shares[i]) & (found < ends[i])
        within = found[mine] - (ends[i] - shares[i])
        # Another choice of records each epoch, none of them twice.
        records[mine] = part.offset + sampling.shuffled(
            within, part.count, [*key, i + 2]
        )
    return records


def _batches(
    rng: np.random.Generator, rows: list[list[int]], data: DataConfig, *, fill: bool
) -> list[list[list[int]]]:
    """Shuffled rows of one budget -> whole batches; what is left over is left out.

    With `fill`, rows that do not make one batch are one with empty rows.
    """
    rows = _shuffled(rng, rows, data)
    if fill and 0 < len(rows) < data.rows:
        rows += [[]] * (data.rows - len(rows))
    return [
        rows[i : i + data.rows] for i in range(0, len(rows) - data.rows + 1, data.rows)
    ]


def _shuffled(
    rng: np.random.Generator, rows: list[list[int]], data: DataConfig
) -> list[list[int]]:
    counts = np.array([len(row) for row in rows], np.int64)
    return [rows[r] for r in groups.row_order(rng, counts, data.caption_rows)]


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of images -> (offsets, images)."""
    offsets = np.cumsum([0, *map(len, rows)])
    return offsets, np.array([image for row in rows for image in row], np.int64)
