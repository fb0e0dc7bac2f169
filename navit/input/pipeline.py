"""Plan -> pixels -> packed batches, on grain."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from navit import config
from navit.batch import Batch, PackedImages
from navit.input import memory, tokens
from navit.input.fill import Errors, fill_rows, slot_array
from navit.input.stream_plan import Planned, StreamPlans
from navit.plan.batches import BatchPlans
from navit.plan.epoch import VERSION, Part, grids_of
from navit.plan.groups import host_rows
from navit.plan.rows import Rows
from navit.plan.view_groups import shapes_of, unfit
from navit.plan.view_rows import grids_of as grids_of_views
from navit.sources.kinds import Opener
from navit.sources.kinds import open_source as open_source
from navit.sources.kinds import open_train_source as open_train_source
from navit.sources.mixture import MixtureSource
from navit.sources.overlap import check_overlap
from navit.sources.source import Source
from navit.sources.stream import Carried, StreamSource

log = logging.getLogger("navit")

# Each kind of draw has its own number in the random key; `fill.py` has 3.
_WHICH_CAPTION = 4

# Batches that grain prepares ahead, in this process or in each worker.
_AHEAD, _AHEAD_PER_WORKER = 4, 2

# If a batch has this many images or more and none can be read, the storage is at fault.
_NO_ACCIDENT = 8


def open_eval_source(data: config.DataConfig, opener: Opener | None = None) -> Source:
    """Opens `data.eval`, or the training images if it is not set.

    Warns if training reads the same images.

    Args:
      opener: what has opened the training images, if they are open.

    Raises:
      ValueError: if training reads images that the config holds out for evaluation;
        and as `Opener.open` does.
    """
    opener = opener or Opener()
    if data.eval is None:
        log.info("evaluating on the training images, as data.eval is not set")
        return opener.open(data.train)
    source, train = data.eval, data.train
    if (
        isinstance(source, config.Folder)
        and isinstance(train, config.Folder)
        and not source.path
    ):
        table = source.table or train.table
        source = dataclasses.replace(
            source, path=train.path, table=table, missing=train.missing
        )
    check_overlap(train, source)
    return opener.open(source)


def parts_of(source: Source) -> tuple[Part, ...]:
    """The parts of a mixture for the plan; none for other sources."""
    if not isinstance(source, MixtureSource):
        return ()
    offsets = np.cumsum([0, *source.counts[:-1]]).tolist()
    return tuple(map(Part, offsets, source.counts, source.shares))


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


def fingerprint(source: Source | StreamSource) -> str:
    """Changes with the data, or with the way it is planned."""
    return f"{source.fingerprint()}, plan {VERSION}"


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
        slots, source = self._slots, self._source
        group = self._data.caption_rows or 1
        images, captions, errors = fill_rows(
            rows,
            source.record,
            patch_size=self._patch_size,
            row_tokens=self._data.row_tokens,
            slots=slots,
            resample=self._data.strategy.resample
            if self._data.strategy
            else "bilinear",
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


class MakeStreamBatch(grain.transforms.Map):
    """Planned rows and their records -> a `Batch`; its ids count the records read."""

    def __init__(self, make_batch: Callable[[Source], MakeBatch]) -> None:
        self._make_batch = make_batch

    def map(self, planned: Planned) -> Batch:
        batch = self._make_batch(Carried(planned.records)).map(planned.rows)
        ids = np.where(batch.id < 0, -1, planned.numbers[batch.id])
        return batch._replace(id=ids)


def check_memory(cfg: config.Config, process_count: int = 1) -> None:
    """Refuses batches that do not fit in this host's memory, before any data is read.

    Counts only the pixels of the batches that are made ahead and of the two that
    `navit/train/feed.py` holds, so training takes more.

    Raises:
      ValueError: if that is more than is free, or `data.rows` cannot be shared by the
        processes.
    """
    data, patch_size = cfg.data, cfg.model.vision.patch_size
    rows = host_rows(data, process_count)
    ahead = data.workers * _AHEAD_PER_WORKER or _AHEAD
    batches = min(cfg.train.steps, ahead + 2)
    memory.check(
        batches * rows * data.row_tokens * patch_size**2 * 3,
        f"holding {batches} batches of data.rows={data.rows} x data.row_tokens="
        f"{data.row_tokens}"
        + (f", shared by {process_count} processes," if process_count > 1 else ""),
        "lower data.rows or data.row_tokens"
        + (f", or data.workers={data.workers}" if data.workers else ""),
    )


def train_batches(
    cfg: config.Config,
    source: Source | StreamSource | None = None,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch] | Generator[Batch, None, None]:
    """This host's training batches, from `start_step` to `cfg.train.steps`.

    Batch i is a function of only the config and i, so a run resumes exactly with any
    number of workers. All batches are numpy arrays of the same shapes.

    Args:
      source: an opened source, from `navit.open_source` or your own object with the
        members of `navit.sources.source.Source`; None opens `cfg.data.train`.
      process_index, process_count: which host this is, and of how many.

    Raises:
      TypeError: if `cfg` is not a Config, or `source` not an opened source.
      ValueError: if a planned grid reaches beyond the position table, or `data.rows`
        cannot be shared by the processes.
    """
    if not isinstance(cfg, config.Config):
        raise TypeError(
            f"cfg is {cfg!r}, but should be a navit.Config: pass navit.Config(...)"
        )
    if source is None:
        source = open_train_source(cfg.data.train)
    elif not isinstance(source, Source | StreamSource):
        raise TypeError(
            f"source is {source!r}, but should be an opened source: pass "
            "navit.open_source(source)"
        )
    data, vision = cfg.data, cfg.model.vision
    options: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "steps": cfg.train.steps,
        "process_index": process_index,
        "process_count": process_count,
    }
    threads, ahead = (1, 1) if data.workers else (2, _AHEAD)
    plans: BatchPlans | StreamPlans
    if isinstance(source, StreamSource):
        # grain requests one batch more than it reads ahead.
        plans = StreamPlans(source, data, in_flight=ahead + 1, **options)
    else:
        plans = BatchPlans(source.sizes, data, parts=parts_of(source), **options)
    make = functools.partial(
        MakeBatch,
        data=data,
        patch_size=vision.patch_size,
        slots=plans.slots,
        captions=plans.captions,
        text_tower=cfg.model.text,
        named=set(),
    )
    make_batch: grain.transforms.Map
    if isinstance(source, StreamSource):
        most = data.most_tokens(vision.patch_size)
        vision.position.check(np.array([[1, most], [most, 1]]))  # any may come
        make_batch = MakeStreamBatch(make)
    else:
        if data.strategy is not None:
            _check_views(vision, source, data, plans.slots)
        elif vision.position.has_limit:
            _check_positions(vision, source.sizes, data)
        make_batch = make(source)
    if process_index == 0:
        log.info("%s", plans.summary())
    dataset = grain.MapDataset.source(plans).map(make_batch)[start_step:]
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    if not data.workers:
        return iter(dataset.to_iter_dataset(read))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags when it starts workers
    workers = grain.multiprocessing.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=_AHEAD_PER_WORKER
    )
    batches = dataset.to_iter_dataset(read).mp_prefetch(
        workers, worker_init_fn=_start_worker
    )
    return _from_workers(iter(batches))


def _from_workers(
    batches: grain.DatasetIterator[Batch],
) -> Generator[Batch, None, None]:
    """Batches from worker processes, which start at the first batch."""
    try:
        # Workers inherit this mask; without it, a Ctrl-C before `_start_worker` would
        # end them. Python's resource tracker lifts the mask when it starts, so it
        # starts first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            batch = next(batches, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while batch is not None:
            yield _owned(batch)
            batch = next(batches, None)
    finally:
        batches.close()


def _owned(batch: Batch) -> Batch:
    """A copy of a worker's batch, whose shared memory is released here.

    grain releases it with the last reference, and memory still referenced when the
    process ends is reported as leaked.
    """
    return Batch(PackedImages(*map(_copied, batch.images)), *map(_copied, batch[1:]))


def _copied(array: np.ndarray) -> np.ndarray:
    if isinstance(array, grain.multiprocessing.SharedMemoryArray):
        array._unlink_on_del = False  # it is unlinked here
        array.shm.unlink()
    return np.array(array)


def _check_positions(
    vision: config.VisionConfig, sizes: np.ndarray, data: config.DataConfig
) -> None:
    """Raises ValueError if one of `sizes` `[m, 2]` may outgrow the position table."""
    most = data.most_tokens(vision.patch_size)
    if data.crop is not None and vision.position.kind == "learned_1d":
        vision.position.check(np.array([[1, most]]))
    vision.position.check(grids_of(sizes, most, data, vision.patch_size))
    if data.crop is None:
        return
    # The aspect of a crop is that of its image times a factor between low and high, or
    # slightly beyond, because its sides are whole pixels.
    low, high = data.crop.aspect
    area = data.crop.area[0] * min(1.0, low, 1 / high)
    least = np.maximum(1, sizes.min(-1, keepdims=True) * area**0.5)
    slack = (least + 0.5) / (least - 0.5)
    for aspect in (low / slack, high * slack):
        stretch = np.concatenate([aspect**-0.5, aspect**0.5], -1)
        grids = grids_of(np.maximum(1, sizes * stretch), most, data, vision.patch_size)
        vision.position.check(grids)


def _check_views(
    vision: config.VisionConfig, source: Source, data: config.DataConfig, slots: int
) -> None:
    """Says which images the plan leaves out, since their views do not fit.

    Raises:
      ValueError: if none is left, or a view may outgrow the position table.
    """
    shapes, which = shapes_of(source.sizes, data, slots=slots)
    vision.position.check(grids_of_views([v for shape in shapes for v in shape.views]))
    left_out = unfit(shapes, which)
    if not len(left_out):
        return
    first = int(left_out[0])
    name, reason = source.name(first), shapes[which[first]].reason
    if len(left_out) == len(which):
        raise ValueError(f"no image of data.train fits; {name}: {reason}")
    log.warning(
        "%d of %d images are left out, first %s: %s",
        len(left_out),
        len(which),
        name,
        reason,
    )


def _start_worker(worker: int, count: int) -> None:
    """Makes a worker ignore Ctrl-C, and end with its parent.

    Ctrl-C reaches all processes; a worker that died of it would stop the save. A worker
    whose parent was killed would live on and keep its pipes open.
    """
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
