"""Records that can only be read in order -> rows, with grain's best-fit packer.

The packer needs only lengths. So every worker and every host reads all records, but
decodes only the images of its own rows. The number of workers and hosts changes
nothing, and a run resumes by reading the earlier records again, without decoding.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from navit import config
from navit.plan import groups, sampling
from navit.plan.epoch import draw
from navit.plan.rows import Rows
from navit.sources.stream import Streamed, StreamSource

# Each kind of draw has its own number in the random key.
_ORDER, _DRAWS, _GROUPS = 5, 6, 7

# grain closes all rows when an image fits in none: with four times as many open rows it
# pads about as little as the plan.
_ROWS = 4


class Planned(NamedTuple):
    """A host's rows of a step, and the records of the global batch, which they index.

    Attributes:
      numbers: `[len(records)]` records that were read before each.
    """

    rows: Rows
    records: tuple[Streamed, ...]
    numbers: np.ndarray


class StreamPlans(Sequence):
    """Step -> this host's rows of that step's global batch; steps in order are fast.

    The stream is read epoch after epoch.

    Args:
      in_flight: how many steps threads may ask for before the first of them is
        answered. If a request comes later still, the stream is read again from its
        start.
    """

    def __init__(
        self,
        source: StreamSource,
        data: config.DataConfig,
        *,
        patch_size: int,
        steps: int,
        in_flight: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        assert isinstance(data.train, config.Stream) and data.slots
        self._in_flight = in_flight
        self._source, self._data, self._patch_size = source, data, patch_size
        self._window, self.slots, self._steps = data.train.window, data.slots, steps
        self.captions = data.captions or data.slots
        count = groups.host_rows(data, process_count)
        self._mine = process_index * count, (process_index + 1) * count
        self._start()

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step):  # type: ignore[no-untyped-def]
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        with self._lock:
            if step < self._next and step not in self._kept:
                self._start_again()
            while self._next <= step:
                packed = list(itertools.islice(self._packed, self._data.rows))
                self._kept[self._next] = packed
                self._kept.pop(self._next - self._in_flight, None)
                self._next += 1
            packed = self._kept.pop(step)
        grouped = self._grouped([row["item"] for row in packed], step)
        items = [item for row in grouped for item in row]
        rows = _rows([[rows for *_, rows in row] for row in grouped], step)
        numbers = np.array([number for number, *_ in items])
        records = tuple(record for _, record, _ in items)
        return Planned(rows.slice(*self._mine), records, numbers)

    def _grouped(self, rows: list[list[Any]], step: int) -> list[list[Any]]:
        """A batch's rows in groups; images beyond a group's places are left out."""
        group = self._data.caption_rows
        if group is None:
            return rows
        rng = np.random.default_rng([self._data.seed, step, _GROUPS])
        order = groups.row_order(rng, np.array([*map(len, rows)]), group)
        return groups.cut([rows[i] for i in order], group, self.captions)

    def summary(self) -> str:
        return (
            f"{len(self._source.files)} files, read in order and shuffled among "
            f"{self._window} records; {self._steps} steps"
        )

    def __getstate__(self) -> dict:
        unpicklable = ("_lock", "_packed", "_kept", "_next")
        return {k: v for k, v in self.__dict__.items() if k not in unpicklable}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._start_again()

    def _start_again(self) -> None:
        self._next = 0
        self._kept: dict[int, list] = {}
        data = self._data
        ordered = grain.experimental.WindowShuffleIterDataset(
            _Ordered(self._drawn),
            window_size=self._window,
            seed=data.seed % 2**31,
        )
        self._packed = iter(
            grain.experimental.BestFitPackIterDataset(
                ordered,
                length_struct={"tokens": data.row_tokens},
                num_packing_bins=_ROWS * data.open_rows,
                seed=data.seed,
                meta_features=("item",),
                max_sequences_per_bin=self.slots,
            )
        )

    def _drawn(self) -> Iterator[dict[str, Any]]:
        """Every record with its draws, epoch after epoch."""
        data, count = self._data, itertools.count()
        weights = np.array(data.budget_weights or [1.0] * len(data.budgets))
        for epoch in itertools.count():
            rng = np.random.default_rng([data.seed, epoch, _ORDER])
            order, error = rng.permutation(len(self._source.files)).tolist(), ""
            usable = False
            for record in self._source.read(order):
                usable, error = usable or not record.error, record.error or error
                number = next(count)
                rng = np.random.default_rng([data.seed, epoch, _DRAWS, number])
                if data.sides is not None:
                    budget = sampling.token_budgets(rng, 1, data, self._patch_size)
                else:
                    budget = rng.choice(data.budgets, 1, p=weights / weights.sum())
                rows = draw(
                    rng,
                    np.array([record.size]),
                    budget,
                    data,
                    patch_size=self._patch_size,
                    seen=np.array([number]),
                )
                yield {
                    "tokens": np.zeros(int(rows.lengths[0]), np.bool_),
                    "item": (number, record, rows),
                }
            if not usable:
                raise ValueError(f"not one record of the stream is usable: {error}")


class _Ordered(grain.IterDataset):
    """Iterates over a generator, always from its start."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        super().__init__()
        self._make = make

    def __iter__(self) -> grain.DatasetIterator:
        return _OrderedIterator(self._make())


class _OrderedIterator(grain.DatasetIterator):
    def __init__(self, values: Iterator[Any]) -> None:
        super().__init__()
        self._values = values

    def __next__(self) -> Any:
        return next(self._values)

    def get_state(self) -> dict[str, Any]:
        return {}  # the packer asks for one; a run resumes by reading again

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _rows(images: list[list[Rows]], step: int) -> Rows:
    """Rows of images that were drawn one by one."""
    flat = [image for row in images for image in row]

    def joined(name: str) -> np.ndarray | None:
        values = [getattr(image, name) for image in flat]
        return None if values[0] is None else np.concatenate(values)

    grids = joined("grids")
    assert grids is not None
    return Rows(
        np.cumsum([0, *map(len, images)]),
        np.arange(len(flat)),
        grids,
        joined("kept"),
        joined("boxes"),
        joined("flips"),
        epoch=step,  # so that later draws differ from step to step
    )
