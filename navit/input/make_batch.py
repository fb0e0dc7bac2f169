"""Planned rows -> a training batch: pixels, captions, labels."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable

import grain
import numpy as np

from navit import config
from navit.batch import Batch
from navit.input import tokens
from navit.input.chunks import ChunkReader
from navit.input.fill import Errors, fill_rows, slot_array
from navit.plan.batches import BatchPlans
from navit.plan.rows import Rows
from navit.sources.source import Record, Source

log = logging.getLogger("navit")

# Each kind of draw has its own number in the random key; `fill.py` has 3.
_WHICH_CAPTION = 4

# If a batch has this many images or more and none can be read, the storage is at fault.
_NO_ACCIDENT = 8


class MakeBatch(grain.transforms.Map):
    """Planned rows -> a `Batch`: decodes the images, tokenizes a caption for each.

    Args:
      named: the unreadable images that a warning has already named.
    """

    def __init__(
        self,
        source: Source,
        data: config.DataConfig,
        *,
        patch_size: int,
        slots: int,
        captions: int,
        text_tower: config.TextConfig | None,
        named: set[str],
    ) -> None:
        self._source, self._data, self._patch_size = source, data, patch_size
        self._slots, self._captions, self._text = slots, captions, text_tower
        self._named = named

    def map(self, rows: Rows) -> Batch:
        return self.made(rows, self._source.record)

    def made(self, rows: Rows, read: Callable[[int], Record]) -> Batch:
        """A batch of planned rows; `read` gives the record of an index."""
        slots, source, strategy = self._slots, self._source, self._data.strategy
        group = self._data.caption_rows or 1
        images, captions, errors = fill_rows(
            rows,
            read,
            patch_size=self._patch_size,
            row_tokens=self._data.row_tokens,
            slots=slots,
            resample="bilinear" if strategy is None else strategy.resample,
            dct=self._data.dct,
            seed=self._data.seed,
        )
        self._report(errors, rows.images)
        owner, first, images_in = owners(rows, group)
        token_ids = np.zeros((len(first), 1), np.int32)
        if self._text:
            texts = [
                self._drawn(captions[i], int(rows.index[i]), rows.epoch) for i in first
            ]
            token_ids = tokens.encode(texts, self._text.length, self._text.tokenizer)
        labels = np.full(len(rows.index), -1, np.int32)
        if source.tasks:
            task = next(iter(source.tasks.values()))
            labels = task.labels[rows.index].astype(np.int32)
        counts = np.diff(rows.offsets)
        return Batch(
            images=images,
            text=slot_array(images_in, self._captions, token_ids, tokens.PAD),
            owner=slot_array(counts, slots, owner, -1),
            label=slot_array(counts, slots, labels, -1),
            id=slot_array(counts, slots, rows.index, -1),
            size=slot_array(counts, slots, source.sizes[rows.index], 0),
        )

    def _drawn(self, captions: tuple[str, ...], index: int, epoch: int) -> str:
        """One caption of a record; "" if there is none, as the record is unreadable."""
        if len(captions) < 2:
            return captions[0] if captions else ""
        rng = np.random.default_rng([self._data.seed, epoch, _WHICH_CAPTION, index])
        return captions[rng.integers(len(captions))]

    def _report(self, errors: Errors, count: int) -> None:
        """Names the unreadable images; raises OSError if the storage is at fault."""
        for index, error in errors:
            name = self._source.name(index)
            if name not in self._named:
                self._named.add(name)
                log.warning("left empty: %s (%s)", name, error)
        lost = [index for index, error in errors if isinstance(error, OSError)]
        if count == len(lost) >= _NO_ACCIDENT:
            raise OSError(
                f"not one of the {count} images of a batch could be read (first "
                f"{self._source.name(lost[0])}): is the storage still there? The run "
                "can resume from its last checkpoint"
            )


class MakeLaneBatch(grain.transforms.Map):
    """A number -> the batch of some of this host's lanes at a step.

    Number `step * shares + i` is that of share i of the lanes. So each of `shares`
    worker processes always has the same lanes, and reads no chunk of another.
    """

    def __init__(self, make: MakeBatch, source: Source, plans: BatchPlans, shares: int):
        self._make, self._source, self._plans = make, source, plans
        self._shares, self._readers = shares, dict[int, ChunkReader]()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}}

    def map(self, number: int) -> Batch:
        step, share = divmod(number, self._shares)
        count = len(self._plans.lanes) // self._shares
        lanes = self._plans.lanes[share * count : (share + 1) * count]
        if share not in self._readers:
            self._readers.setdefault(
                share, ChunkReader(self._source, self._plans, lanes)
            )
        reader = self._readers[share]
        reader.ahead(step)
        rows = self._plans.of_lanes(step, lanes)
        return self._make.made(rows, functools.partial(reader.take, rows.epoch))


def owners(rows: Rows, group: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Which caption each segment has, in a list of captions for every `group` rows.

    Returns:
      owner: `[m]` int32 place of each segment's image among those of its group, in the
        order in which they first appear.
      first: each image's first segment, in the order of all lists.
      counts: `[g]` images in each group.
    """
    owner, first, counts = [], [], []
    for start, stop in itertools.pairwise(rows.offsets[::group].tolist()):
        place: dict[int, int] = {}
        for i, index in enumerate(rows.index[start:stop].tolist(), start):
            if index not in place:
                place[index] = len(place)
                first.append(i)
            owner.append(place[index])
        counts.append(len(place))
    return np.array(owner, np.int32), first, np.array(counts)
