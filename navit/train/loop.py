"""The training run, top to bottom."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from navit import config as config_lib
from navit.batch import Batch
from navit.config import Config
from navit.embed import Embedder
from navit.evals import budgets
from navit.input import pipeline
from navit.optim import make_optimizer, make_schedule
from navit.sharding import Rules, make_mesh, use_mesh
from navit.train.checkpoint import Checkpoints
from navit.train.metrics import Meter, MetricsWriter, line
from navit.train.state import init_state
from navit.train.step import make_train_step

log = logging.getLogger("navit")

# What may change between the runs that share a work directory: nothing that decides
# what is computed.
_FREE = ("eval.", "mesh.", "data.workers", "train.log_", "train.check", "train.keep")


def train(config: Config, workdir: Path) -> bool:
    """Trains to `config.train.steps`, from the latest checkpoint if there is one.

    Writes `config.json`, `metrics.jsonl` and `checkpoints/` in `workdir`, then the
    evaluation over token budgets.

    Returns:
      True when training and evaluation are done, False when it was interrupted (the
      state is saved, and the same call goes on from there).

    Raises:
      ValueError: if `workdir` holds a run of another config.
      FloatingPointError: if the loss is not finite.
    """
    source = pipeline.open_source(config.data.train)
    mesh, rules = make_mesh(config.mesh)
    with use_mesh(mesh), _Interruption() as interruption:
        checkpoints = Checkpoints(workdir, keep=config.train.keep)
        try:
            state = _start(config, workdir, rules, checkpoints)
            first_step = int(state.step)
            batches = pipeline.train_batches(
                config,
                source,
                start_step=first_step,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            optimizer = make_optimizer(config.optim, config.train.steps)
            schedule = make_schedule(config.optim, config.train.steps)
            train_step = make_train_step(config, optimizer, rules)
            writer = MetricsWriter(workdir / "metrics.jsonl", first_step)
            meter = Meter(config.train.steps)

            for step in range(first_step + 1, config.train.steps + 1):
                before = time.perf_counter()
                batch = next(batches)
                meter.add(batch, time.perf_counter() - before)
                state, metrics = train_step(state, to_device(batch, rules))
                if step % config.train.log_every == 0 or step == config.train.steps:
                    values = {name: float(value) for name, value in metrics.items()}
                    values |= {"step": step, "lr": float(schedule(step - 1))}
                    values |= meter.read(step)
                    if not math.isfinite(values["loss"]):
                        raise FloatingPointError(
                            f"the loss is {values['loss']} at step {step}: lower "
                            "optim.lr or optim.clip_norm; the last checkpoint is of "
                            f"step {checkpoints.latest_step()}"
                        )
                    if jax.process_index() == 0:
                        writer.write(values)
                        log.info(line(values, config.train.steps))
                if step % config.train.checkpoint_every == 0:
                    checkpoints.save(state, config)
                if interruption.requested and step < config.train.steps:
                    checkpoints.save(state, config)
                    checkpoints.close()
                    log.info(
                        "interrupted; saved step %d in %s. Run the same command again "
                        "to go on from there",
                        step,
                        workdir,
                    )
                    return False
            checkpoints.save(state, config)
        finally:
            checkpoints.close()
        embedder = Embedder(state.model, config, step=config.train.steps)
        budgets.run(embedder, config, workdir)
        return True


def _start(
    config: Config, workdir: Path, rules: Rules, checkpoints: Checkpoints
) -> Any:
    """The state to go on from: the latest checkpoint's, or step 0's."""
    make = functools.partial(
        init_state, config, make_optimizer(config.optim, config.train.steps), rules
    )
    latest = checkpoints.latest_step()
    if latest is None:
        _write_config(config, workdir)
        state = jax.jit(make)()
        count = sum(x.size for x in jax.tree.leaves(state.model))
        log.info("training %.2fM parameters in %s", count / 1e6, workdir)
        return state
    changed = [
        difference
        for difference in config_lib.differences(checkpoints.config(), config)
        if not difference.startswith(_FREE)
    ]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:3])}): "
            "choose another --workdir, delete that one, or go back to its settings"
        )
    if latest >= config.train.steps:
        log.info("%s is trained to step %d already", workdir, latest)
    else:
        log.info("resuming from step %d of %s", latest, workdir)
    return checkpoints.restore(jax.eval_shape(make))


def _write_config(config: Config, workdir: Path) -> None:
    if jax.process_index() == 0:
        temporary = workdir / "config.json.tmp"
        temporary.write_text(json.dumps(config_lib.to_json(config), indent=2) + "\n")
        os.replace(temporary, workdir / "config.json")


def to_device(batch: Batch, rules: Rules) -> Batch:
    """This host's rows -> global arrays, split over the devices by rows."""
    spec = rules("batch")
    if spec is None:
        return jax.device_put(batch)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )


class _Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a request to save and stop."""

    requested = False

    def __enter__(self) -> _Interruption:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("stopping after this step, to save (again to stop at once)")
