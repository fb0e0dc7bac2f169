"""What a run does about a loss or a gradient that is not finite."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
from pathlib import Path

import numpy as np

from navit.batch import Batch
from navit.config import Config
from navit.train import hosts
from navit.train.checkpoint import Checkpoints
from navit.train.state import TrainState
from navit.train.step import Metrics

log = logging.getLogger("navit")

FOLDER = "nonfinite"


class Watch:
    """Reads the outcome of each step when it is there, without waiting for the device.

    The step itself leaves such updates out (`make_train_step`); this reports them.
    WORKDIR/nonfinite has the ids of their images, and for the one that ends a run, the
    state before it, as a work directory that `navit.load` opens.
    """

    def __init__(self, config: Config, data: str, workdir: Path, skipped: int) -> None:
        """Args: skipped: how many updates were left out before."""
        self._config, self._data, self._skipped = config, data, skipped
        self._folder = workdir / FOLDER
        self._running: collections.deque[tuple[int, Metrics, np.ndarray]]
        self._running = collections.deque()

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Takes the metrics of a step that was dispatched, and its host batch."""
        metrics["skipped"].copy_to_host_async()
        self._running.append((step, metrics, np.asarray(batch.id)))

    def check(self, until: int, state: TrainState, checkpoints: Checkpoints) -> None:
        """Looks at the steps up to `until`; waits for those that still run.

        Collective: every host calls it at the same step.

        Args:
          state: the latest one, in case it has to be saved.
          checkpoints: those of the run.

        Raises:
          FloatingPointError: if a step is not finite and may not be left out.
        """
        while self._running and self._running[0][0] <= until:
            step, metrics, ids = self._running.popleft()
            skipped = int(metrics["skipped"])
            if skipped == self._skipped:
                continue
            self._skipped, most = skipped, self._config.train.skips
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            what = f"the loss is {loss} and its gradient norm {norm} at step {step}"
            self._note(step, loss, norm, ids)
            if skipped > most:
                self._stop(what, step, state, checkpoints)
            log.warning(
                "%s: this update is left out (%d of at most %d)", what, skipped, most
            )

    def _note(self, step: int, loss: float, norm: float, ids: np.ndarray) -> None:
        """Adds a line to batches.jsonl; a number that is not finite is a text there."""
        images = np.unique(hosts.gather(ids))
        line = {
            "step": step,
            "loss": loss if np.isfinite(loss) else str(loss),
            "grad_norm": norm if np.isfinite(norm) else str(norm),
            "ids": images[images >= 0].tolist(),
        }
        if hosts.first():
            self._folder.mkdir(exist_ok=True)
            with (self._folder / "batches.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _stop(
        self, what: str, step: int, state: TrainState, checkpoints: Checkpoints
    ) -> None:
        saved = checkpoints.latest_step()
        last = "nothing was saved yet" if saved is None else f"step {saved} is saved"
        most = self._config.train.skips
        remedy = f"raise train.on_nonfinite=skip:{most}, which is used up"
        if not most:
            remedy = "leave such updates out with train.on_nonfinite=skip:10"
        before = state._replace(skipped=state.skipped - 1)
        with contextlib.closing(checkpoints.below(FOLDER)) as before_it:
            before_it.save(before, self._config, self._data)
        raise FloatingPointError(
            f"{what}: lower optim.lr or model.init_scale, or {remedy}; {last}, and "
            f"{self._folder} has the ids of this batch's images and the state of step "
            f"{step - 1}"
        )
