"""The state that a run starts from: a new one, or the latest checkpoint."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from navit import config as config_lib
from navit.config import Config, ModelConfig
from navit.files import write_atomic
from navit.model.two_tower import TwoTower
from navit.sharding import Rules
from navit.train import hosts, lock
from navit.train.checkpoint import Checkpoints
from navit.train.checks import check_unchanged, rounding_changes
from navit.train.optim import make_optimizer
from navit.train.remote_workdir import Remote
from navit.train.state import TrainState, init_state
from navit.train.workdir import is_workdir

log = logging.getLogger("navit")


def start(
    config: Config,
    running: Config,
    data: str,
    workdir: Path,
    rules: Rules,
    checkpoints: Checkpoints,
    initial: Callable[[ModelConfig, Rules], TwoTower] | None,
) -> TrainState:
    """The state to start or resume from; a new run also writes `config.json`.

    Settings that affect only rounding may differ from the checkpoint's, and a kernel
    that fails here is replaced: `changes.jsonl` records both, and from which step.

    Args:
      config: the config of the run, which is saved.
      running: the same with the implementations that work here
        (`kernel_check.replace_failed`), which the model computes with.
      data: the fingerprint of the training data.
      initial: makes the model for step 0; None initializes one randomly.

    Raises:
      ValueError: if `workdir` holds a run with another config or other data, or only
        damaged checkpoints.
    """
    make = functools.partial(
        init_state, running, make_optimizer(config.optim, config.train.steps), rules
    )
    latest = checkpoints.set_damaged_aside()
    hosts.check_same(f"the latest checkpoint in the shared {workdir}", f"{latest}")
    if latest is None:
        if hosts.first():
            saved = json.dumps(config_lib.to_json(config), indent=2) + "\n"
            write_atomic(workdir / "config.json", saved.encode())
            _keep_tokenizer(config, workdir)
        hosts.any_of(False)  # a barrier: config.json is written now
        if checkpoints.shared:
            is_seen = (workdir / "config.json").exists()
            hosts.check_same(f"whether all hosts share {workdir}", f"{is_seen}")
        model = initial(running.model, rules) if initial else None
        state = jax.jit(make)(model=model)
        count = sum(x.size for x in jax.tree.leaves(state.model))
        log.info("training %.2fM parameters in %s", count / 1e6, workdir)
        _record([], rounding_changes(config, running), 0, workdir)
        return state
    before = checkpoints.config()
    check_unchanged(before, config, workdir)
    if data != checkpoints.data():
        raise ValueError(
            f"{workdir} was trained on {checkpoints.data()}, but data.train is now "
            f"{data}: put the data back as it was, or choose another --workdir"
        )
    if latest >= config.train.steps:
        log.info("%s is already trained to step %d", workdir, latest)
    else:
        log.info("resuming from step %d of %s", latest, workdir)
        replaced = rounding_changes(config, running)
        _record(rounding_changes(before, config), replaced, latest, workdir)
    return checkpoints.restore(jax.eval_shape(make))


def trained_model(workdir: Path, remote: Remote | None = None) -> ModelConfig | None:
    """The model of the run to resume in `workdir`; None if there is no checkpoint.

    Moves damaged checkpoints aside; raises the same errors as
    `Checkpoints.set_damaged_aside` and `lock.held`.
    """
    if not is_workdir(workdir):
        return None
    checkpoints = Checkpoints(workdir, remote=remote)
    with lock.held(workdir), contextlib.closing(checkpoints):
        latest = checkpoints.set_damaged_aside()
        return None if latest is None else checkpoints.config().model


def _record(changed: list[str], replaced: list[str], step: int, workdir: Path) -> None:
    """Logs the changed settings and records them in `changes.jsonl`.

    Args:
      replaced: the settings in which the run differs from its config, because a kernel
        fails here. They are recorded when they differ from those of the last start.
    """
    if changed:
        log.info("from here on %s", "; ".join(changed))
    if not hosts.first():
        return
    path = workdir / "changes.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text.splitlines()
    before = json.loads(lines[-1]).get("replaced", []) if lines else []
    if changed or replaced != before:
        line = {"step": step, "changes": changed, "replaced": replaced}
        write_atomic(path, f"{text}{json.dumps(line)}\n".encode())


def _keep_tokenizer(config: Config, workdir: Path) -> None:
    """Copies the tokenizer's file, so that the work directory is self-contained."""
    if config.model.text is None or config.model.text.tokenizer is None:
        return
    tokenizer = Path(config.model.text.tokenizer).expanduser()
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, workdir / tokenizer.name)
