"""Reads the chunks of a host's lanes: each once, in one piece, ahead of need."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from navit.plan.batches import BatchPlans
from navit.sources.images import standard
from navit.sources.source import InPieces, Record, Source

# Chunks that are read at the same time: behind a URL, a thread only waits for its own.
_READS = 32

# A chunk is forgotten this many steps after its last use, as threads are not in step.
_SLACK = 64


class ChunkReader:
    """Hands out the records that lanes use, in about the order of their steps.

    Holds a record in memory only if a planned row will use it, from the reading of its
    chunk until then: about two windows of each lane. A chunk that cannot be read whole
    is read record by record, so that only those at fault are lost.

    Args:
      lanes: those whose steps are asked for.
    """

    def __init__(self, source: Source, plans: BatchPlans, lanes: Sequence[int]) -> None:
        self._source, self._plans, self._lanes = source, plans, lanes
        self._chunks = plans.divided()
        self._window = self._chunks.data.window * self._chunks.data.chunk
        self._pool = ThreadPoolExecutor(_READS, thread_name_prefix="chunks")
        self._lock = threading.Lock()
        # (epoch, first record) -> last step of use, and the chunk's used records.
        self._reading: dict[tuple[int, int], tuple[int, Future[dict[int, Record]]]] = {}
        self._next: int | None = None

    def ahead(self, step: int) -> None:
        """Begins to read what this step needs, and the steps of a window after it."""
        with self._lock:
            if self._next is None:
                self._next = step
            stop = min(step + self._steps_ahead(step), len(self._plans))
            while self._next < stop:
                for lane in self._lanes:
                    self._begin(self._next, lane)
                self._next += 1
            done = [k for k, (last, _) in self._reading.items() if last + _SLACK < step]
            for key in done:
                del self._reading[key]

    def take(self, epoch: int, index: int) -> Record:
        """A record, which is held no longer.

        Raises:
          ValueError, OSError: if it cannot be read.
        """
        start = int(self._chunks.ranges(np.array([index]))[0, 0])
        found = self._reading.get((epoch, start))
        record = None if found is None else found[1].result().pop(index, None)
        return self._source.record(index) if record is None else record

    def _steps_ahead(self, step: int) -> int:
        """Steps that use a window's images, and one more."""
        images = len(self._plans.of_lanes(step, self._lanes[:1]).index)
        return math.ceil(self._window / max(1, images)) + 1

    def _begin(self, step: int, lane: int) -> None:
        """Begins to read the chunks that a lane first uses in this step."""
        rows = self._plans.of_lanes(step, [lane])
        ranges = np.unique(self._chunks.ranges(rows.index), axis=0).tolist()
        unread = [r for r in ranges if (rows.epoch, r[0]) not in self._reading]
        if not unread:
            return
        records, steps = self._plans.used(step, lane)
        for start, stop in unread:
            own = (records >= start) & (records < stop) & (steps >= step)
            used = np.sort(records[own]).tolist()
            reading = self._pool.submit(self._read, used)
            self._reading[rows.epoch, start] = int(steps[own].max()), reading

    def _read(self, indices: list[int]) -> dict[int, Record]:
        """The records that can be read; `take` tries the others again by themselves."""
        found: dict[int, Record] = {}
        source = self._source
        if isinstance(source, InPieces):
            try:
                records = source.neighbours(indices)
                return {
                    i: record._replace(image=standard(record.image))
                    for i, record in zip(indices, records, strict=True)
                }
            except (ValueError, OSError):
                pass
        for i in indices:
            try:
                record = source.record(i)
                found[i] = record._replace(image=standard(record.image))
            except (ValueError, OSError):
                continue
        return found
