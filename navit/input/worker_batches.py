"""Batches from grain's worker processes, which end with this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import resource_tracker

import grain
import numpy as np

from navit.batch import Batch, PackedImages


def from_workers(
    batches: grain.DatasetIterator[Batch], shares: int
) -> Generator[Batch, None, None]:
    """Batches from worker processes, which start at the first batch.

    Args:
      shares: how many of them are one batch.
    """
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
        parts: list[Batch] = []
        while batch is not None:
            parts.append(_owned(batch))
            if len(parts) == shares:
                yield _joined(parts)
                parts = []
            batch = next(batches, None)
    finally:
        batches.close()


def _joined(parts: list[Batch]) -> Batch:
    """One batch of the rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    images = (
        np.concatenate(arrays)
        for arrays in zip(*(x.images for x in parts), strict=True)
    )
    others = (
        np.concatenate(arrays) for arrays in zip(*(x[1:] for x in parts), strict=True)
    )
    return Batch(PackedImages(*images), *others)


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


def start_worker(worker: int, count: int) -> None:
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
