"""Traces a few steps for TensorBoard, xprof or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from navit.config import TrainConfig
from navit.train import hosts

log = logging.getLogger("navit")


class Profile:
    """Traces the steps of `train.profile_steps` into a folder, on the first host.

    As a context manager, it ends a trace that is still open, whatever the reason.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        window = config.profile_window if hosts.first() else None
        self._first, self._last = window or (0, 0)
        self._folder, self._running = folder, False
        self._traced = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "wrote a trace of steps %d to %d to %s",
                self._first,
                self._traced,
                self._folder,
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks the code inside as this step."""
        if not self._first <= step < self._last:
            yield
            return
        if not self._running:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder)
            self._running = True
        self._traced = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, outputs: Any) -> bool:
        """Ends the trace after its last step, once that step's outputs are ready.

        Returns:
          Whether a trace ended, which takes seconds.
        """
        ends = self._running and step + 1 >= self._last
        if ends:
            jax.block_until_ready(outputs)
            self.__exit__()
        return ends
