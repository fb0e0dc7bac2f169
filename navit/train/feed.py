"""Moves batches to the device: the next one is on its way while a step runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from navit.batch import Batch
from navit.sharding import Rules, split_rows


class Feed:
    """This host's batches, at most two of them on the device at a time."""

    def __init__(self, batches: Iterator[Batch], rules: Rules) -> None:
        self._batches, self._rules = batches, rules
        self._next: tuple[Batch, Any] | None = None
        self._running: Future[float] | None = None
        self._watch = ThreadPoolExecutor(1)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.shutdown()

    def take(self) -> tuple[Batch, Any]:
        """The next batch, on the host and on the device."""
        if self._next is None:  # the first batch
            self._put(next(self._batches))
        taken, self._next = self._next, None
        assert taken is not None
        return taken

    def ahead(self, metrics: Any) -> float:
        """Fetches the next batch, if there is one, while a step runs.

        Args:
          metrics: outputs of the step, which has been dispatched and may still run.

        Returns:
          How many seconds the device waited for the batch after its step ended.
        """
        previous, running = self._running, self._watch.submit(_end, metrics)
        self._running = running
        batch = next(self._batches, None)
        if batch is None:
            return 0.0
        if previous is not None:
            previous.result()  # the batch of the step before is off the device
        self._put(batch)
        return time.perf_counter() - running.result() if running.done() else 0.0

    def _put(self, batch: Batch) -> None:
        self._next = batch, split_rows(batch._replace(id=None), self._rules)


def _end(metrics: Any) -> float:
    """Waits for a step to end; returns the time at which it did."""
    jax.block_until_ready(metrics)
    return time.perf_counter()
