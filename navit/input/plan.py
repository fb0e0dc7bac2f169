"""(sizes, seed, epoch) -> which image, at what grid, in which row: integers only.

An image's token count follows from its size and from draws made here, so rows are
packed before any pixel is read. Every host makes the same plan and reads its own rows
of it. An epoch is planned in blocks, so that a long one needs neither hours nor memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from navit.config import DataConfig
from navit.input import geometry, groups, packing, sampling

# Raised when the same config would give other rows; a run does not resume across it.
VERSION = 4

# What a random key is for, so that no two draws share one; the pipeline's are others.
# From 1, as numpy ignores zeros at a key's end.
_ORDER, _DRAWS = 1, 2

# A block holds this many images, and this many global batches at least.
_BLOCK_IMAGES, _BLOCK_BATCHES = 2**18, 64

# How many captions a group of rows needs is told by so many images, and, as dropped
# tokens follow a schedule, by an epoch after any schedule's end.
_SAMPLE, _LATE = 10_000, 2**40

# Rates of dropped tokens at which the rows of such a sample are counted, and moments of
# a block at which the rate is looked up between them. A batch left out is better than
# an empty one, so the steps are this much fewer.
_RATES, _MOMENTS = 33, 16
_FEWER = 0.99


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
    shares = _shares(parts, len(sizes))
    total, size = sum(shares), block_images or _block_images(sizes, data, patch_size)
    first = block * size
    positions = np.arange(first, min(first + size, total))
    index = _records(positions, parts, shares, [data.seed, epoch, _ORDER])
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


class BatchPlans(Sequence):
    """Step -> this host's rows of that step's global batch; random access.

    Every epoch has the same number of steps, on every host: as many as epoch 0 fills,
    at least one. What another epoch has beyond that is left out of it; what it lacks
    comes out as empty rows. Each epoch leaves out other images. Where the rate of
    dropped tokens changes, so does the number of steps, as a sample foretells.

    Args:
      sizes: `[m, 2]` (height, width) of every image.
      steps: how many steps there are in all.
      parts: of a mixture.
      process_index, process_count: which host of how many.

    Attributes:
      steps_per_epoch: in global batches, of epoch 0.
      never_drawn: images of a mixture that an epoch does not take, by the weights.
      slots: images that a row may hold.
      caption_rows, captions: rows in a group, and images that it may hold; without
        `data.caption_rows` every row is one, with all its slots.

    Raises:
      ValueError: if the hosts cannot share the rows, or their groups, evenly.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        data: DataConfig,
        *,
        patch_size: int,
        steps: int,
        parts: Sequence[Part] = (),
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._sizes, self._data, self._patch_size = sizes, data, patch_size
        self._steps, self._parts = steps, tuple(parts)
        self.caption_rows = data.caption_rows or 1
        self._host_rows = groups.host_rows(data, process_count)
        self._first_row = process_index * self._host_rows
        self.slots = data.slots or self._slots()
        self.captions = self._captions()
        images = sum(_shares(parts, len(sizes)))
        self.never_drawn = len(sizes) - images
        self._block_images = _block_images(sizes, data, patch_size)
        blocks = max(1, -(-images // self._block_images))
        starts = np.arange(blocks) * self._block_images
        self._counts = np.minimum(images - starts, self._block_images)
        self._start()
        # The first step of each block, of one epoch after the other.
        self._first_steps = self._all_first_steps()
        self.steps_per_epoch = int(self._first_steps[blocks])

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step):  # type: ignore[no-untyped-def]
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        epoch, block, within, count = self._place(step)
        start = within * self._data.rows + self._first_row
        rows = self._plan(epoch, block).slice(start, start + self._host_rows)
        soon = step + (count + 1) // 2
        if soon < self._steps:
            self._planned(*self._place(soon)[:2])  # on its way, so that nobody waits
        return rows

    def first_block(self) -> tuple[Rows, float]:
        """The rows of epoch 0's first block that are used, and the share of its images
        that are left out; what the other blocks are like."""
        used = self._plan(0, 0).slice(0, int(self._first_steps[1]) * self._data.rows)
        return used, 1 - len(used.index) / max(1, int(self._counts[0]))

    def summary(self) -> str:
        """What an epoch is like."""
        used, left_out = self.first_block()
        fill = used.lengths.sum() / (len(used) * self._data.row_tokens)
        group = f"in {self.caption_rows} rows" if self.caption_rows > 1 else "in a row"
        never = ""
        if self.never_drawn:
            never = (
                f", after the weights of the mixture leave out {self.never_drawn} of "
                f"{len(self._sizes)}"
            )
        return (
            f"{self.steps_per_epoch} steps an epoch: {len(used.index) / len(used):.1f} "
            f"images a row of {self._data.row_tokens} tokens and {self.slots} slots, "
            f"fill {fill:.1%}, {left_out:.1%} of the images left out{never}; captions "
            f"fill {self.captions_filled(used):.0%} of {self.captions} places {group}"
        )

    def captions_filled(self, rows: Rows) -> float:
        """The share of what the text tower computes for these rows that is captions."""
        return len(rows.index) * self.caption_rows / (len(rows) * self.captions)

    def __getstate__(self) -> dict:
        left = ("_planned", "_planner")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._planner = ThreadPoolExecutor(1)
        self._planned = functools.lru_cache(maxsize=3)(self._plan_later)

    def _place(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, block, step in the block, steps that the block has)."""
        which = int(np.searchsorted(self._first_steps, step, "right")) - 1
        first, end = self._first_steps[which : which + 2].tolist()
        return *divmod(which, len(self._counts)), step - first, end - first

    def _all_first_steps(self) -> np.ndarray:
        blocks = len(self._counts)
        rows = np.full(blocks, len(self._plan(0, 0)))
        rows[-1] = len(self._plan(0, blocks - 1))  # it may be shorter
        rates, needed = self._rows_by_rate()
        epochs = 1
        while True:
            share = self._by_schedule(epochs, rates, needed)
            share[:, :-1] /= share[0, 0]
            share[:, -1] /= share[0, -1]
            share[share != 1] *= _FEWER
            steps = (rows * share).astype(np.int64) // self._data.rows
            steps[:, 0] = np.maximum(1, steps[:, 0])
            total = steps.sum()
            if total >= self._steps:
                return np.cumsum([0, *steps.reshape(-1).tolist()])
            epochs = max(epochs + 1, int(1.1 * epochs * self._steps / total))

    def _by_schedule(
        self, epochs: int, rates: np.ndarray, needed: np.ndarray
    ) -> np.ndarray:
        """Rows that an image takes on average, `[epochs, blocks]`."""
        counts, drop = self._counts, self._data.drop
        if drop is None or len(rates) == 1:
            return np.ones((epochs, len(counts)))
        before = np.arange(epochs)[:, None] * counts.sum() + np.cumsum(counts) - counts
        moments = (np.arange(_MOMENTS) + 0.5) / _MOMENTS
        seen = before[..., None] + counts[:, None] * moments
        rate = sampling.drop_rate(drop, seen)
        return np.interp(rate, rates, needed).mean(-1)

    def _rows_by_rate(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates of dropped tokens, and the rows that a sample of the images takes."""
        drop = self._data.drop
        if drop is None or drop.rate == drop.last_rate:
            return np.zeros(1), np.ones(1)
        low, high = sorted((drop.rate, drop.last_rate))
        rates = np.linspace(low, high, _RATES)
        weights = self._data.budget_weights or (1.0,) * len(self._data.budgets)
        if self._data.budget_per == "image":
            weights = (1.0,)
        needed = np.zeros(_RATES)
        for i, rate in enumerate(rates.tolist()):
            same = dataclasses.replace(drop, rate=rate, final_rate=rate)
            rows = self._sampled(dataclasses.replace(self._data, drop=same))
            needed[i] = np.dot(weights, [len(found) for found in rows])
        return rates, needed

    def _sampled(self, data: DataConfig, epoch: int = 0) -> list[Rows]:
        """Rows of some images of epoch 0; with one budget a batch, of each budget."""
        shares = _shares(self._parts, len(self._sizes))
        some = np.arange(min(_SAMPLE, sum(shares)))
        some = _records(some, self._parts, shares, [data.seed, 0, _ORDER])
        kinds = [data]
        if data.budget_per == "batch":
            alone = dataclasses.replace(data, budget_weights=(), budget_per="image")
            kinds = [dataclasses.replace(alone, budgets=(x,)) for x in data.budgets]
        return [
            plan_block(
                self._sizes[some],
                kind,
                patch_size=self._patch_size,
                epoch=epoch,
                slots=self.slots,
            )
            for kind in kinds
        ]

    def _plan(self, epoch: int, block: int) -> Rows:
        return self._planned(epoch, block).result()

    def _plan_later(self, epoch: int, block: int) -> Future[Rows]:
        return self._planner.submit(
            plan_block,
            self._sizes,
            self._data,
            patch_size=self._patch_size,
            epoch=epoch,
            block=block,
            parts=self._parts,
            slots=self.slots,
            captions=self.captions,
            block_images=self._block_images,
        )

    def _captions(self) -> int:
        """The images that a group of rows may hold: as many as nearly all groups do."""
        data, group = self._data, self.caption_rows
        if data.captions or not data.caption_rows:
            return min(data.captions or self.slots, group * self.slots)
        # With one budget a batch, some budget's batches need most.
        found = [
            groups.captions_for(np.diff(rows.offsets), group)
            for epoch in ((0, _LATE) if data.drop else (0,))
            for rows in self._sampled(data, epoch)
        ]
        return min(max(found), group * self.slots)

    def _slots(self) -> int:
        """Twice the images that a row holds on average, to the nearest power of two."""
        images = self._data.row_tokens / _mean_tokens(
            self._sizes, self._data, self._patch_size
        )
        return 2 ** max(0, round(np.log2(2 * images)))


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


def _mean_tokens(sizes: np.ndarray, data: DataConfig, patch_size: int) -> float:
    """What an image takes on average, at the end of the schedule of dropped tokens."""
    seen = float(np.mean(data.crop.area)) ** 0.5 if data.crop else 1.0
    mean = typical_tokens(sizes, data, patch_size, count=10_000, seen=seen)
    return max(1.0, mean * (1 - data.drop.last_rate if data.drop else 1))


def _block_images(sizes: np.ndarray, data: DataConfig, patch_size: int) -> int:
    if len(sizes) <= _BLOCK_IMAGES:
        return _BLOCK_IMAGES
    mean = _mean_tokens(sizes, data, patch_size)
    batch = round(data.rows * data.row_tokens / mean)
    return max(_BLOCK_IMAGES, _BLOCK_BATCHES * batch)


def _shares(parts: Sequence[Part], count: int) -> list[int]:
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


def _records(
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
