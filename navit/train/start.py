"""The state that a run starts from: step 0's, or the latest checkpoint's."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from navit import config as config_lib
from navit.config import Config
from navit.files import write_atomic
from navit.model.two_tower import TwoTower
from navit.sharding import Rules
from navit.train import hosts
from navit.train.checkpoint import Checkpoints
from navit.train.checks import changes, rounding_changes
from navit.train.optim import make_optimizer
from navit.train.state import TrainState, init_state

log = logging.getLogger("navit")


def start(
    config: Config,
    data: str,
    workdir: Path,
    rules: Rules,
    checkpoints: Checkpoints,
    initial: Callable[[Rules], TwoTower] | None,
) -> TrainState:
    """The state to go on from; writes `config.json` where there was none.

    Settings that change numbers by rounding alone may differ from the checkpoint's:
    `changes.jsonl` keeps which, and from which step.

    Args:
      data: the fingerprint of the training data.
      initial: makes the model of step 0; None starts from random.

    Raises:
      ValueError: if `workdir` holds a run of another config or of other data, or no
        checkpoint in it is whole.
    """
    make = functools.partial(
        init_state, config, make_optimizer(config.optim, config.train.steps), rules
    )
    latest = checkpoints.set_damaged_aside()
    hosts.check_same(
        f"the latest checkpoint in {workdir}, which all share,", f"{latest}"
    )
    if latest is None:
        if hosts.first():
            saved = json.dumps(config_lib.to_json(config), indent=2) + "\n"
            write_atomic(workdir / "config.json", saved.encode())
            _keep_tokenizer(config, workdir)
        hosts.any_of(False)  # now it is written
        found = (workdir / "config.json").exists()
        hosts.check_same(f"{workdir}, which all share, and its config.json", f"{found}")
        state = jax.jit(make)(model=initial(rules) if initial else None)
        count = sum(x.size for x in jax.tree.leaves(state.model))
        log.info("training %.2fM parameters in %s", count / 1e6, workdir)
        return state
    before = checkpoints.config()
    if changed := changes(before, config):
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:3])}): "
            "choose another --workdir, delete that one, or go back to its settings"
        )
    if data != checkpoints.data():
        raise ValueError(
            f"{workdir} was trained on {checkpoints.data()}, and data.train now has "
            f"{data}: put the data back as it was, or choose another --workdir"
        )
    if latest >= config.train.steps:
        log.info("%s is trained to step %d already", workdir, latest)
    else:
        log.info("resuming from step %d of %s", latest, workdir)
        if rounded := rounding_changes(before, config):
            _record(rounded, latest, workdir)
    return checkpoints.restore(jax.eval_shape(make))


def _record(changed: list[str], step: int, workdir: Path) -> None:
    """Says what is computed another way from here on, and keeps it in the workdir."""
    log.info("from here on %s", "; ".join(changed))
    if hosts.first():
        line = json.dumps({"step": step, "changes": changed}) + "\n"
        with (workdir / "changes.jsonl").open("a") as file:
            file.write(line)


def _keep_tokenizer(config: Config, workdir: Path) -> None:
    """Copies a tokenizer's file, so that the work directory stands alone."""
    tokenizer = Path(config.model.text.tokenizer if config.model.text else "")
    if tokenizer.expanduser().is_file():
        shutil.copyfile(tokenizer.expanduser(), workdir / tokenizer.name)
