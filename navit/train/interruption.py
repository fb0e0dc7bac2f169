"""Turns Ctrl-C or SIGTERM into a request to save and stop, in all processes.

SIGTERM is how platforms announce that they take a machine back: Kubernetes, Slurm,
SkyPilot, and Google Cloud when it shuts down a spot machine. It is also all that jax's
`reached_preemption_sync_point` listens to, and that could not tell a second signal from
the first; so the processes ask one another instead (`Interruption.after`).
"""

from __future__ import annotations

import enum
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


class Outcome(enum.Enum):
    """How a run ended; true only if it is done. The values are for the log."""

    DONE = "done"
    INTERRUPTED = "interrupted"  # by Ctrl-C
    PREEMPTED = "preempted"  # by SIGTERM

    def __bool__(self) -> bool:
        return self is Outcome.DONE


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop."""

    requested = False
    preempted = False

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

    def after(self, step: int, failed: bool = False) -> bool:
        """Whether to stop after this step; the same answer in every process.

        Args:
          failed: whether this process cannot go on, as its checkpoint was not written.
        """
        wanted = self.requested or failed
        if jax.process_count() == 1:
            return wanted
        if step < self._ask_at:
            return False
        stop, now, steps = hosts.any_of(wanted), time.perf_counter(), 1
        if self._asked is not None:  # the first interval includes compilation
            last, then = self._asked
            # From the slowest process, so that all ask at the same step.
            seconds = hosts.gather(np.array([now - then])).max() / (step - last)
            steps = int(np.clip(_ASK_SECONDS / seconds, 1, _ASK_STEPS))
        self._asked, self._ask_at = (step, now), step + steps
        return stop

    def outcome(self) -> Outcome:
        """What the processes were asked to do; collective, and the same in each."""
        if hosts.any_of(self.preempted):
            return Outcome.PREEMPTED
        if hosts.any_of(self.requested):
            return Outcome.INTERRUPTED
        return Outcome.DONE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.preempted = True, number == signal.SIGTERM
        # A warning, because only process 0 logs lower levels.
        log.warning("stopping soon, after saving (interrupt again to stop at once)")
