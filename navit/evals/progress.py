"""Progress of an evaluation where no terminal shows a bar, such as in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import jax

from navit.sources.source import Record

log = logging.getLogger("navit")

_EVERY = 15.0  # seconds


class Progress:
    """Reads images, and logs every 15 seconds how many, how fast, and the time left.

    Images are read a few batches before they are embedded. Of several processes, each
    counts its own share, and the first speaks.

    Args:
      read: index -> record, from several threads.
      total: the images to embed, by all processes.
    """

    def __init__(self, read: Callable[[int], Record], total: int) -> None:
        self._read, self._total, self._done = read, total, 0
        self._began = self._said = time.monotonic()

    def read(self, index: int) -> Record:
        """The record at an index."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said = now
            if jax.process_index() == 0:
                self._say(now - self._began)
        return self._read(index)

    def _say(self, seconds: float) -> None:
        done = min(self._done * jax.process_count(), self._total)
        speed = done / seconds
        left = (self._total - done) / speed
        log.info(
            "%d of %d images  %.1f images/s  ETA %s",
            done,
            self._total,
            speed,
            f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s",
        )
