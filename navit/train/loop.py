"""The training run, top to bottom."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from navit.config import Config, ModelConfig
from navit.embed import Embedder
from navit.evals import budgets, results
from navit.evals.tasks import Opened, open_tasks
from navit.input import pipeline
from navit.model.two_tower import TwoTower
from navit.sharding import Rules, make_mesh, use_mesh
from navit.sources.kinds import Opener
from navit.sources.local_cache import open_cache
from navit.sources.source import Source
from navit.train import hosts, lock
from navit.train.checkpoint import Checkpoints
from navit.train.checks import (
    check_captions,
    check_config,
    check_devices,
    check_split,
)
from navit.train.feed import Feed
from navit.train.interruption import Interruption, Outcome
from navit.train.kernel_check import replace_failed
from navit.train.metrics import Meter, line
from navit.train.nonfinite import Watch
from navit.train.optim import make_optimizer, make_schedule
from navit.train.profile import Profile
from navit.train.remote_workdir import Remote
from navit.train.start import start
from navit.train.state import TrainState
from navit.train.step import make_train_step
from navit.train.trackers import open_writers

log = logging.getLogger("navit")


def train(
    config: Config,
    workdir: Path,
    initial: Callable[[ModelConfig, Rules], TwoTower] | None = None,
    remote: Remote | None = None,
) -> Outcome:
    """Trains to `config.train.steps`, from the latest checkpoint if there is one.

    Writes `config.json`, `metrics.jsonl` and `checkpoints/` to `workdir`, and then the
    evaluation over token budgets.

    Args:
      initial: makes the model for step 0; None initializes one randomly.
      remote: sends `workdir` to a URL (`remote_workdir.training`).

    Returns:
      How it ended; true when training and evaluation are done. After an interruption,
      the state is saved, and the same call resumes from it.

    Raises:
      ValueError: if `workdir` holds a run with another config or other data, if another
        process is training in it, or if a batch takes more memory than is free.
      FloatingPointError: if the loss is not finite.
    """
    check_config(config)
    mesh, rules = make_mesh(config.mesh)
    with use_mesh(mesh):
        check_devices(config, rules)
        budgets.check_memory(config)
    pipeline.check_memory(config, jax.process_count())
    opener = Opener(cache=open_cache(config.data))
    # Before the training images, so that a wrong path is named before they are indexed.
    opened = open_tasks(config, opener=opener)
    source = opener.open(config.data.train)
    data = pipeline.fingerprint(source, config.data)
    with use_mesh(mesh):
        budgets.check(config, opened, source)
    log.info("training on %s", source.fingerprint())
    for images in {each.images for each in opened}:
        log.info("evaluating on %d images", images.limit)
    held_out = (len(x.images.source) for x in opened if x.task.source is None)
    check_split(config, source, next(held_out, 0))
    check_captions(config, source)
    hosts.check_same_config(config)
    hosts.check_same("data.train", data)
    hosts.check_same("what is evaluated", budgets.describe(opened))
    running = replace_failed(config, mesh, rules)
    with use_mesh(mesh), lock.held(workdir):
        with Checkpoints(
            workdir,
            keep=config.train.keep,
            keep_every=config.train.keep_every,
            remote=remote,
        ) as checkpoints:
            state = start(config, running, data, workdir, rules, checkpoints, initial)
            first_step = int(state.step)
            with Interruption() as interruption:
                state = _steps(
                    state,
                    config,
                    running,
                    source,
                    opened,
                    data,
                    rules,
                    checkpoints,
                    workdir,
                    interruption,
                )
                checkpoints.save(state, config, data)
                checkpoints.wait()  # a Ctrl-C waits for this too
        step = int(state.step)
        outcome = interruption.outcome()  # even after the last step
        if not outcome:
            log.info(
                "%s; saved step %d in %s. Run the same command again to resume",
                outcome.value,
                step,
                workdir,
            )
            return outcome
        measured = budgets.run(
            Embedder(state.best, config, step=step),
            config,
            opened,
            workdir,
            cache=workdir / "embeddings" if remote is None else None,
        )
        if config.eval.every and hosts.first() and first_step < step:
            for writer in open_writers(config, workdir, step):
                writer.write({"step": step, **results.logged(measured.rows)})
                writer.close()
        return outcome


def _steps(
    state: TrainState,
    config: Config,
    running: Config,
    source: Source,
    opened: Sequence[Opened],
    data: str,
    rules: Rules,
    checkpoints: Checkpoints,
    workdir: Path,
    interruption: Interruption,
) -> TrainState:
    """Trains to the last step, or until a stop is requested.

    Args:
      config: the config of the run, which is saved with checkpoints.
      running: the same, with the implementations that the step computes with.
    """
    first_step, last_step = int(state.step), config.train.steps
    optimizer = make_optimizer(config.optim, last_step)
    schedule = make_schedule(config.optim, last_step)
    train_step = make_train_step(running, optimizer, rules)
    batches = pipeline.train_batches(
        config,
        source,
        start_step=first_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    writes = hosts.first() and first_step < last_step
    writers = open_writers(config, workdir, first_step) if writes else []
    mesh = jax.sharding.get_mesh()
    meter = Meter(config, devices=1 if mesh.empty else mesh.size)
    watch = Watch(config, data, workdir, int(state.skipped))
    if first_step < last_step:
        log.info("compiling the training step; on a CPU this takes up to a minute")
    with contextlib.ExitStack() as stack:
        for resource in (batches, *writers):
            stack.callback(resource.close)
        feed = stack.enter_context(Feed(batches, rules))
        profile = stack.enter_context(Profile(config.train, workdir / "profile"))
        for step in range(first_step + 1, last_step + 1):
            with profile.step(step):
                batch, on_device = feed.take()
                state, metrics = train_step(state, on_device)
                watch.add(step, metrics, batch)
                meter.add(batch, feed.ahead(metrics))
                watch.check(step - 1, state, checkpoints)
            traced = profile.after(step, metrics)

            if traced or step == first_step + 1:  # traced or compiled: not in the rates
                jax.block_until_ready(metrics)
                meter.start_clock()
            stop = step == last_step or interruption.after(step, checkpoints.failed())
            save = step % config.train.checkpoint_every == 0 or stop
            if save or step % config.train.log_every == 0:
                watch.check(step, state, checkpoints)
            if step % config.train.log_every == 0 or step == last_step:
                values = {name: float(value) for name, value in metrics.items()}
                skipped = int(values.pop("skipped"))
                if config.train.skips:
                    values["skipped"] = skipped
                values |= {"step": step, "lr": float(schedule(step - 1))}
                values |= meter.read(step)
                for writer in writers:
                    writer.write(values)
                log.info(line(values, last_step))
            if save:
                checkpoints.save(state, config, data)
            if stop:
                break
            if config.eval.every and step % config.eval.every == 0:
                embedder = Embedder(state.best, config, step=step)
                measured = budgets.run(embedder, config, opened, workdir)
                for writer in writers:
                    writer.write({"step": step, **results.logged(measured.rows)})
                meter.start_clock()
    if meter.unreadable:
        log.warning("%d images could not be read in this run", len(meter.unreadable))
    return state
