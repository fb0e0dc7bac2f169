"""Ctrl-C, as a request to save and stop; of several processes, together."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax

from navit.train import hosts

log = logging.getLogger("navit")

# Steps between two questions of each process to the others: they wait for the device.
_ASK_EVERY = 10


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a request to save and stop."""

    requested = False

    def __enter__(self) -> Interruption:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: set by a library in C, as jax does among several processes.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() == 1:
            return self.requested
        return step % _ASK_EVERY == 0 and hosts.any_of(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A warning, as any one of several processes may be told.
        log.warning("stopping soon, to save (again to stop at once)")
