"""Plan -> pixels -> packed batches, on grain."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from absl import flags

from navit import config
from navit.batch import Batch
from navit.input import memory
from navit.input.make_batch import MakeBatch, MakeLaneBatch
from navit.input.worker_batches import from_workers, start_worker
from navit.plan.batches import BatchPlans, LeftOut
from navit.plan.epoch import VERSION, grids_of
from navit.plan.groups import host_rows
from navit.plan.lanes import chunk_ends
from navit.plan.order import Part
from navit.plan.strategies.views import check_patch
from navit.plan.view_groups import room_of, shapes_of
from navit.sources.kinds import Opener
from navit.sources.kinds import open_source as open_source
from navit.sources.local_cache import open_cache
from navit.sources.mixture import MixtureSource
from navit.sources.overlap import check_overlap
from navit.sources.source import InGroups, Source

log = logging.getLogger("navit")

# Sizes that are checked at the same time.
_AT_ONCE = 2**20

# Batches that grain prepares ahead, in this process or in each worker.
_AHEAD, _AHEAD_PER_WORKER = 4, 2


def open_eval_source(data: config.DataConfig, opener: Opener | None = None) -> Source:
    """Opens `data.eval`, or the training images if it is not set.

    Warns if training reads the same images.

    Args:
      opener: what has opened the training images, if they are open.

    Raises:
      ValueError: if training reads images that the config holds out for evaluation;
        and as `Opener.open` does.
    """
    opener = opener or Opener(cache=open_cache(data))
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


def parts_of(source: Source, data: config.DataConfig) -> tuple[Part, ...]:
    """The parts of a mixture for the plan; one if lanes read the source in groups.

    Raises:
      ValueError: if a group is too large for a lane.
    """
    if isinstance(source, MixtureSource):
        offsets = np.cumsum([0, *source.counts[:-1]]).tolist()
        ends = [_chunk_ends(each, data) for each in source.sources]
        return tuple(map(Part, offsets, source.counts, source.shares, ends))
    ends_of_one = _chunk_ends(source, data)
    return () if ends_of_one is None else (Part(0, len(source), 1.0, ends_of_one),)


def _chunk_ends(source: Source, data: config.DataConfig) -> np.ndarray | None:
    if not data.lanes or not isinstance(source, InGroups) or source.groups is None:
        return None
    return chunk_ends(source.groups, data)


def fingerprint(source: Source, data: config.DataConfig) -> str:
    """Changes with the data, or with the way it is planned."""
    chunks = ""
    ends = [part.ends for part in parts_of(source, data) if part.ends is not None]
    if ends:
        chunks = f", chunks {hashlib.sha256(np.concatenate(ends)).hexdigest()[:16]}"
    return f"{source.fingerprint()}{chunks}, plan {VERSION}"


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
    source: Source | None = None,
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
        source = Opener(cache=open_cache(cfg.data)).open(cfg.data.train)
    elif not isinstance(source, Source):
        raise TypeError(
            f"source is {source!r}, but should be an opened source: pass "
            "navit.open_source(source)"
        )
    data, vision = cfg.data, cfg.model.vision
    if data.strategy is not None:  # with `init_towers`, the config did not know it
        check_patch(data.strategy, vision.patch_size)
    threads, ahead = (1, 1) if data.workers else (2, _AHEAD)
    plans = BatchPlans(
        source.sizes,
        data,
        parts=parts_of(source, data),
        patch_size=vision.patch_size,
        steps=cfg.train.steps,
        process_index=process_index,
        process_count=process_count,
    )
    make_batch = MakeBatch(
        source,
        data,
        patch_size=vision.patch_size,
        slots=plans.slots,
        captions=plans.captions,
        text_tower=cfg.model.text,
        named=set(),
    )
    if vision.position.has_limit:
        for start in range(0, len(source), _AT_ONCE):
            some = source.sizes[start : start + _AT_ONCE]
            _check_positions(vision, np.asarray(some), data)
    if (line := left_out(plans.left_out(), source)) and process_index == 0:
        log.warning("%s", line)
    if process_index == 0:
        log.info("%s", plans.summary())
    dataset: Any = grain.MapDataset.source(plans).map(make_batch)[start_step:]
    shares = 1
    if data.lanes:
        shares = data.workers or 1
        if len(plans.lanes) % shares:
            raise ValueError(
                f"each process has {len(plans.lanes)} of data.lanes={data.lanes}, and "
                f"data.workers={data.workers} cannot share them evenly: change one"
            )
        make_lanes = MakeLaneBatch(make_batch, source, plans, shares)
        numbers = grain.MapDataset.range(len(plans) * shares)
        dataset = numbers.map(make_lanes)[start_step * shares :]
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    if not data.workers:
        return iter(dataset.to_iter_dataset(read))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags when it starts workers
    workers = grain.multiprocessing.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=_AHEAD_PER_WORKER
    )
    batches = dataset.to_iter_dataset(read).mp_prefetch(
        workers, worker_init_fn=start_worker
    )
    return from_workers(iter(batches), shares)


def _check_positions(
    vision: config.VisionConfig, sizes: np.ndarray, data: config.DataConfig
) -> None:
    """Raises ValueError if one of `sizes` `[m, 2]` may outgrow the position table."""
    if data.strategy is not None:
        room = room_of(data, data.slots)
        for shape in shapes_of(sizes, data.strategy, room)[0]:
            vision.position.check(shape.views[:, -2:])
        return
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


def left_out(found: LeftOut | None, source: Source) -> str:
    """A line on the images whose views do not fit the plan; empty if all do.

    Raises:
      ValueError: if none is left.
    """
    if found is None:
        return ""
    name = f"{source.name(found.first)}: {found.reason}"
    if found.images == len(source):
        raise ValueError(f"no image of data.train fits; {name}")
    about = "" if found.exact else "about "
    return f"{about}{found.images} of {len(source)} images do not fit, such as {name}"
