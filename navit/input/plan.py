"""(sizes, seed, epoch) -> which image, at what grid, in which row: integers only.

An image's token count follows from its size, so a whole epoch is packed before any
pixel is read. Every host makes the same plan and reads its own rows of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from navit.config import DataConfig
from navit.input import geometry, packing


@dataclasses.dataclass(frozen=True)
class Rows:
    """Planned rows: row r holds images `index[offsets[r]:offsets[r+1]]`, slot by slot.

    Attributes:
      offsets: `[rows + 1]` int64.
      index: `[m]` int64 record in the source.
      grids: `[m, 2]` int32 (rows, columns) of patches.
      epoch: which epoch they belong to; draws that leave the plan as it is (the choice
        among several captions) depend on it.
    """

    offsets: np.ndarray
    index: np.ndarray
    grids: np.ndarray
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`; those past the end come out empty."""
        offsets = self.offsets[np.minimum(np.arange(start, stop + 1), len(self))]
        images = slice(offsets[0], offsets[-1])
        return Rows(
            offsets - offsets[0], self.index[images], self.grids[images], self.epoch
        )


def pack_rows(
    grids: np.ndarray, row_tokens: int, slots: int | None, open_rows: int = 16
) -> Rows:
    """Packs images, given in order by their grids `[m, 2]`, into rows."""
    rows = packing.best_fit(
        grids.prod(-1).tolist(), row_tokens, open_rows=open_rows, max_images=slots
    )
    offsets = np.cumsum([0] + [len(row) for row in rows])
    index = np.array([i for row in rows for i in row], np.int64)
    return Rows(offsets, index, grids[index])


def plan_epoch(
    sizes: np.ndarray, data: DataConfig, *, patch_size: int, epoch: int
) -> Rows:
    """Plans one epoch: a pure function of its arguments.

    Shuffles, draws a token budget for each image, finds its grid, packs, and shuffles
    the rows.

    Args:
      sizes: `[m, 2]` (height, width) of every image in pixels.
    """
    rng = np.random.default_rng([data.seed, epoch])
    order = rng.permutation(len(sizes))
    budgets = rng.choice(np.array(data.budgets), len(sizes))
    grids = geometry.grids_for(
        sizes[order], budgets, patch_size=patch_size, max_upscale=data.max_upscale
    )
    packed = pack_rows(grids, data.row_tokens, data.slots, data.open_rows)
    lengths = np.diff(packed.offsets)
    shuffle = rng.permutation(len(packed))
    images = np.concatenate(
        [np.arange(packed.offsets[r], packed.offsets[r + 1]) for r in shuffle]
    )
    return Rows(
        np.concatenate([[0], np.cumsum(lengths[shuffle])]),
        order[packed.index[images]],
        packed.grids[images],
        epoch,
    )


class BatchPlans(Sequence):
    """Step -> this host's rows of that step's global batch; random access.

    Every epoch has the same number of steps, on every host: as many as epoch 0 fills,
    at least one. What another epoch has beyond that is left out of it; what it lacks
    comes out as empty rows. Each epoch leaves out other images.

    Args:
      sizes: `[m, 2]` (height, width) of every image.
      steps: how many steps there are in all.
      process_index, process_count: which host of how many.

    Raises:
      ValueError: if the hosts cannot share the rows evenly.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        data: DataConfig,
        *,
        patch_size: int,
        steps: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if data.rows % process_count:
            raise ValueError(
                f"data.rows={data.rows} is not divisible by {process_count} processes"
            )
        self._sizes, self._data, self._patch_size = sizes, data, patch_size
        self._steps = steps
        self._host_rows = data.rows // process_count
        self._first_row = process_index * self._host_rows
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self.steps_per_epoch = max(1, len(self._plan(0)) // data.rows)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step):  # type: ignore[no-untyped-def]
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self._data.rows + self._first_row
        return self._plan(epoch).slice(start, start + self._host_rows)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_plan"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> Rows:
        return plan_epoch(
            self._sizes, self._data, patch_size=self._patch_size, epoch=epoch
        )
