"""Turns Ctrl-C into a request to save and stop, the same in all processes."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np

from navit.train import hosts

log = logging.getLogger("navit")

# How often the processes ask one another: after this many seconds, or at most this many
# steps. Asking waits for the device, and a 30-second notice must leave time to save.
_ASK_SECONDS = 5.0
_ASK_STEPS = 10


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a request to save and stop."""

    requested = False

    def __init__(self) -> None:
        self._ask_at = 0
        self._asked: tuple[int, float] | None = None  # step and time

    def __enter__(self) -> Interruption:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: set by a C library, as jax does in a run of several processes.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() == 1:
            return self.requested
        if step < self._ask_at:
            return False
        stop, now, steps = hosts.any_of(self.requested), time.perf_counter(), 1
        if self._asked is not None:  # the first interval includes compilation
            last, then = self._asked
            # From the slowest process, so that all ask at the same step.
            seconds = hosts.gather(np.array([now - then])).max() / (step - last)
            steps = int(np.clip(_ASK_SECONDS / seconds, 1, _ASK_STEPS))
        self._asked, self._ask_at = (step, now), step + steps
        return stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A warning, because only process 0 logs lower levels.
        log.warning("stopping soon, after saving (interrupt again to stop at once)")
