"""Step -> its planned rows, over epochs, blocks and hosts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from navit.config import DataConfig
from navit.plan import groups, sampling
from navit.plan.epoch import images_per_block, mean_tokens, plan_block, sampled_sizes
from navit.plan.lanes import Lanes, lanes_of
from navit.plan.order import ORDER, Part, part_shares, records_at
from navit.plan.rows import Rows, joined
from navit.plan.view_groups import left_out, room_of, shapes_of, tokens_of

# The captions that a group of rows needs are counted on this many images and, if token
# dropping follows a schedule, also in an epoch after its end.
_SAMPLE, _LATE = 10_000, 2**40

# The images that a strategy leaves out are counted among this many.
_LOOKED_AT = 100_000

# The rows of such a sample are counted at this many rates of dropped tokens, and each
# block interpolates between them at this many moments. Leaving out a batch is better
# than an empty one, so the number of steps is scaled down.
_RATES, _MOMENTS = 33, 16
_FEWER = 0.99

# Lanes differ in their number of rows. Leaving out a row is better than an empty one.
_FEWER_OF_LANE = 0.995


class Statistics(NamedTuple):
    """An epoch at one row length, as its first block has it; shares are from 0 to 1."""

    row_tokens: int
    padding: float
    images_per_row: float
    slots: int
    slots_filled: float
    captions_filled: float
    steps_per_epoch: int
    left_out: float


class LeftOut(NamedTuple):
    """The images whose views do not fit a group of rows.

    Attributes:
      images: how many there are; estimated from a sample unless `exact`.
      first, reason: the record of one of them, and why it does not fit.
    """

    images: int
    exact: bool
    first: int
    reason: str


class BatchPlans(Sequence):
    """Step -> this host's rows of that step's global batch; random access.

    Every epoch has the same number of steps on every host: as many as epoch 0 fills,
    at least one. If another epoch has more rows, the rest is left out; if it has fewer,
    they are padded with empty rows. Each epoch leaves out other images. If the rate of
    dropped tokens changes, so does the number of steps, as estimated from a sample.

    Args:
      sizes: `[m, 2]` (height, width) of every image.
      steps: the total number of steps.
      parts: the parts of a mixture.
      process_index, process_count: this host's index, and the number of hosts.

    Attributes:
      steps_per_epoch: the global batches of epoch 0.
      never_drawn: images of a mixture that the weights leave out of an epoch.
      slots: the most segments in a row.
      caption_rows, captions: rows in a group, and the most images in it; without
        `data.caption_rows` every row is a group, with a place for each slot.

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
        host_rows = groups.host_rows(data, process_count)
        # The lanes of this host, the rows of each in a batch, and the first of them.
        count = max(1, data.lanes // process_count)
        self.lanes = range(process_index * count, (process_index + 1) * count)
        self._lane_rows = host_rows // count
        self._first_row = 0
        if not data.lanes:
            self.lanes, self._first_row = range(1), process_index * host_rows
        self.slots = data.slots or self._slots()
        self.captions = self._captions()
        if data.lanes:
            lanes = self.divided()
            images, self._block_images = lanes.images, lanes.block_images
            self._counts = lanes.blocks()
        else:
            images = sum(part_shares(parts, len(sizes)))
            self._block_images = images_per_block(sizes, data, patch_size)
            blocks = max(1, -(-images // self._block_images))
            starts = np.arange(blocks) * self._block_images
            self._counts = np.minimum(images - starts, self._block_images)
        self.never_drawn = len(sizes) - images
        blocks = len(self._counts)
        self._start()
        # The first step of each block, epoch after epoch.
        self._first_steps = self._all_first_steps()
        self.steps_per_epoch = int(self._first_steps[blocks])

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step):  # type: ignore[no-untyped-def]
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        return self.of_lanes(step, self.lanes)

    def of_lanes(self, step: int, lanes: Sequence[int]) -> Rows:
        """The rows of some of this host's lanes, one lane after the other."""
        epoch, block, within, count = self._place(step)
        start = within * self._batch_rows + self._first_row
        soon = step + (count + 1) // 2
        if soon < self._steps:  # in the background, ahead of need
            for lane in lanes:
                self._planned(*self._place(soon)[:2], lane)
        return joined(
            [
                self._plan(epoch, block, lane).slice(start, start + self._lane_rows)
                for lane in lanes
            ]
        )

    def divided(self) -> Lanes:
        """The chunks of the data and their lanes."""
        return lanes_of(self._data, self._parts, len(self._sizes))

    def used(self, step: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """When the records of a lane's block are used: `[m]` records, `[m]` steps.

        Args:
          step: any step of the block.
        """
        epoch, block, within, count = self._place(step)
        rows = self._plan(epoch, block, lane).slice(0, count * self._batch_rows)
        row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        return rows.index, step - within + row // self._batch_rows

    @property
    def _batch_rows(self) -> int:
        """The rows of a plan that a step takes, on all hosts that have it."""
        return self._lane_rows if self._data.lanes else self._data.rows

    def first_block(self) -> tuple[Rows, float]:
        """The used rows of epoch 0's first block, and the share of its images left out.

        With lanes, those of the first lane. Other blocks and lanes are similar.
        """
        used = self._plan(0, 0).slice(0, int(self._first_steps[1]) * self._batch_rows)
        planned = int(self._counts[0]) / (self._data.lanes or 1)
        return used, 1 - used.images / max(1, planned)

    def left_out(self) -> LeftOut | None:
        """The images that a strategy leaves out; None if it leaves out none.

        Of more than 100,000 images, they are counted on a sample.
        """
        data, total = self._data, len(self._sizes)
        if data.strategy is None:
            return None
        some = np.unique(np.linspace(0, total - 1, _LOOKED_AT).astype(int))
        room = room_of(data, self.slots)
        shapes, which = shapes_of(self._sizes[some], data.strategy, room)
        bad = left_out(shapes, which)
        if not len(bad):
            return None
        return LeftOut(
            images=round(len(bad) / len(some) * total),
            exact=len(some) == total,
            first=int(some[bad[0]]),
            reason=shapes[which[bad[0]]].reason,
        )

    def statistics(self) -> Statistics:
        used, left_out = self.first_block()
        images, row_tokens = used.images, self._data.row_tokens
        return Statistics(
            row_tokens=row_tokens,
            padding=1 - float(used.lengths.sum()) / (len(used) * row_tokens),
            images_per_row=images / len(used),
            slots=self.slots,
            slots_filled=len(used.index) / (len(used) * self.slots),
            captions_filled=self.captions_filled(used),
            steps_per_epoch=self.steps_per_epoch,
            left_out=left_out,
        )

    def summary(self) -> str:
        """Describes an epoch in one line."""
        epoch = self.statistics()
        group = f"in {self.caption_rows} rows" if self.caption_rows > 1 else "per row"
        never = ""
        if self.never_drawn:
            never = (
                f", after the weights of the mixture leave out {self.never_drawn} of "
                f"{len(self._sizes)}"
            )
        return (
            f"{epoch.steps_per_epoch} steps per epoch: {epoch.images_per_row:.1f} "
            f"images per row of {epoch.row_tokens} tokens and {epoch.slots} slots, "
            f"fill {1 - epoch.padding:.1%}, {epoch.left_out:.1%} of the images left "
            f"out{never}; captions fill {epoch.captions_filled:.0%} of "
            f"{self.captions} places {group}"
        )

    def captions_filled(self, rows: Rows) -> float:
        """The share of the text tower's work on these rows that is real captions."""
        return rows.images * self.caption_rows / (len(rows) * self.captions)

    def __getstate__(self) -> dict:
        unpicklable = ("_planned", "_planner")
        return {k: v for k, v in self.__dict__.items() if k not in unpicklable}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._planner = ThreadPoolExecutor(1)
        self._planned = functools.lru_cache(maxsize=3 * len(self.lanes))(
            self._plan_later
        )

    def _place(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, block, step within the block, steps in the block)."""
        block = int(np.searchsorted(self._first_steps, step, "right")) - 1
        first, end = self._first_steps[block : block + 2].tolist()
        return *divmod(block, len(self._counts)), step - first, end - first

    def _all_first_steps(self) -> np.ndarray:
        blocks = len(self._counts)
        rows = np.full(blocks, len(self._plan(0, 0)))
        # The last may be shorter, and that of the last lane shortest.
        last = max(0, self._data.lanes - 1)
        rows[-1] = len(self._plan(0, blocks - 1, last))
        if self._data.lanes:
            lanes = self.divided()
            share = np.full(blocks, lanes.least(0, 0))
            share[-1] = lanes.least(blocks - 1, last)
            rows = np.floor(_FEWER_OF_LANE * share * rows)
        rates, needed = self._rows_by_rate()
        epochs = 1
        while True:
            share = self._by_schedule(epochs, rates, needed)
            share[:, :-1] /= share[0, 0]
            share[:, -1] /= share[0, -1]
            share[share != 1] *= _FEWER
            steps = (rows * share).astype(np.int64) // self._batch_rows
            steps[:, 0] = np.maximum(1, steps[:, 0])
            total = steps.sum()
            if total >= self._steps:
                return np.cumsum([0, *steps.reshape(-1).tolist()])
            epochs = max(epochs + 1, int(1.1 * epochs * self._steps / total))

    def _by_schedule(
        self, epochs: int, rates: np.ndarray, needed: np.ndarray
    ) -> np.ndarray:
        """Rows that the sample takes at each block's rates, `[epochs, blocks]`.

        Args:
          rates, needed: `[r]` each, from `_rows_by_rate`.
        """
        counts, drop = self._counts, self._data.drop
        if drop is None or len(rates) == 1:
            return np.ones((epochs, len(counts)))
        before = np.arange(epochs)[:, None] * counts.sum() + np.cumsum(counts) - counts
        moments = (np.arange(_MOMENTS) + 0.5) / _MOMENTS
        seen = before[..., None] + counts[:, None] * moments
        rate = sampling.drop_rate(drop, seen)
        return np.interp(rate, rates, needed).mean(-1)

    def _rows_by_rate(self) -> tuple[np.ndarray, np.ndarray]:
        """Rates of dropped tokens, and the rows that a sample takes at each; `[r]`."""
        drop = self._data.drop
        if drop is None or not drop.changes:
            return np.zeros(1), np.ones(1)
        low, high = sorted((drop.rate, drop.last_rate))
        rates = np.linspace(low, high, _RATES)
        weights = self._data.budget_weights or (1.0,) * len(self._data.budgets)
        if self._data.budget_per == "image":
            weights = (1.0,)
        needed = np.zeros(_RATES)
        for i, rate in enumerate(rates.tolist()):
            same = dataclasses.replace(drop, rate=rate, final_rate=rate)
            plans = self._sampled(dataclasses.replace(self._data, drop=same))
            needed[i] = np.dot(weights, [len(rows) for rows in plans])
        return rates, needed

    def _sampled(self, data: DataConfig, epoch: int = 0) -> list[Rows]:
        """Rows of a sample of epoch 0; one plan per budget if batches draw budgets."""
        shares = part_shares(self._parts, len(self._sizes))
        positions = np.arange(min(_SAMPLE, sum(shares)))
        data = dataclasses.replace(data, lanes=0)  # a sample is not where it lies
        sample = records_at(positions, self._parts, shares, [data.seed, 0, ORDER])
        configs = [data]
        if data.budget_per == "batch":
            single = dataclasses.replace(data, budget_weights=(), budget_per="image")
            configs = [dataclasses.replace(single, budgets=(x,)) for x in data.budgets]
        return [
            plan_block(
                self._sizes[sample],
                config,
                patch_size=self._patch_size,
                epoch=epoch,
                slots=self.slots,
            )
            for config in configs
        ]

    def _plan(self, epoch: int, block: int, lane: int = 0) -> Rows:
        return self._planned(epoch, block, lane).result()

    def _plan_later(self, epoch: int, block: int, lane: int) -> Future[Rows]:
        return self._planner.submit(
            plan_block,
            self._sizes,
            self._data,
            patch_size=self._patch_size,
            epoch=epoch,
            block=block,
            lane=lane,
            parts=self._parts,
            slots=self.slots,
            captions=self.captions,
            block_images=self._block_images,
        )

    def _captions(self) -> int:
        """The most images in a group of rows: enough for nearly all groups."""
        data, group = self._data, self.caption_rows
        if data.captions or not data.caption_rows:
            return min(data.captions or self.slots, group * self.slots)
        if data.strategy is not None:
            (rows,) = self._sampled(data)
            starts = range(0, len(rows), group)
            held = [rows.slice(start, start + group).images for start in starts]
            return groups.captions_for(np.array(held), 1) if held else 1
        # If each batch has one budget, the budget that needs most decides.
        needed = [
            groups.captions_for(np.diff(rows.offsets), group)
            for epoch in ((0, _LATE) if data.drop else (0,))
            for rows in self._sampled(data, epoch)
        ]
        return min(max(needed), group * self.slots)

    def _slots(self) -> int:
        """Twice the mean number of segments in a row, to the nearest power of two."""
        if self._data.strategy is not None:
            _, mean = tokens_of(sampled_sizes(self._sizes, _SAMPLE), self._data)
        else:
            mean = mean_tokens(self._sizes, self._data, self._patch_size)
        return 2 ** max(0, round(np.log2(2 * self._data.row_tokens / mean)))
