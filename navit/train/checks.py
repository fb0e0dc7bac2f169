"""Checks before and during a run, so that it does not fail silently."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from navit import config as config_lib
from navit.config import Config, Folder
from navit.config.model import ROUNDING
from navit.input import tokens
from navit.model.attention import misfit
from navit.sharding import (
    Rules,
    compute_capability,
    multiplies_bfloat16,
    platform,
)
from navit.sources.source import Source
from navit.train.trackers import check_installed

log = logging.getLogger("navit")

# `check_captions` reads this many runs of this many consecutive records.
_RUNS, _RUN = 8, 32

# Settings that a resumed run may change, since they do not affect what is computed.
_FREE = (
    "eval.",
    "data.eval",
    "data.workers",
    "data.cache",
    "train.log_",
    "train.checkpoint_",
    "train.keep",
    "train.profile_steps",
    "train.check_kernels",
    "init_towers",  # the towers themselves are compared
)
# Settings that affect only rounding, or only a run that is about to end: a resumed run
# may change them, and records it.
_ROUNDING = (
    *ROUNDING,
    "mesh.",
    "train.microbatches",
    "train.losses.sigmoid.implementation",
    "train.on_nonfinite",
)
# Data may move as well, and its fields may have other names: its fingerprint shows
# whether it is the same.
_COVERED = ("path", "data_dir", "table", "caption", "label")


def changes(before: Config, now: Config) -> list[str]:
    """`key: a -> b` for each change that affects what a run computes."""
    return [x for x in _differences(before, now) if not x.startswith(_ROUNDING)]


def check_unchanged(before: Config, now: Config, workdir: str | Path) -> None:
    """Raises ValueError if `now` computes something else than the run in `workdir`."""
    if changed := changes(before, now):
        longer = any(change.startswith("train.steps:") for change in changed)
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(changed[:3])}): "
            "choose another --workdir, delete this one, or restore its settings"
            + (f"; to train longer, set init={workdir} in a new one" if longer else "")
        )


def rounding_changes(before: Config, now: Config) -> list[str]:
    """`key: a -> b` for each change that affects only rounding."""
    return [x for x in _differences(before, now) if x.startswith(_ROUNDING)]


def _differences(before: Config, now: Config) -> list[str]:
    before, now = (
        dataclasses.replace(
            x, data=dataclasses.replace(x.data, train=_without_places(x.data.train))
        )
        for x in (before, now)
    )
    differences = config_lib.differences(before, now)
    return [x for x in differences if not x.startswith(_FREE)]


def _without_places(source: config_lib.AnySource) -> Any:
    if isinstance(source, config_lib.Mixture):
        sources = tuple(_without_places(x) for x in source.sources)
        return dataclasses.replace(source, sources=sources)
    names = {field.name for field in dataclasses.fields(source)}
    blank: Any = {name: "" for name in names & {*_COVERED}}
    return dataclasses.replace(source, **blank)


def check_config(config: Config) -> None:
    """Checks settings before any data is read; warns about an unlikely warm-up.

    Raises:
      ValueError: if there is no loss, random weights are frozen, `init_towers` is set
        without `init`, the tokenizer has more ids than the text tower, or a package
        that `train.log_to` needs is missing.
    """
    check_installed(config)
    if not config.train.losses:
        raise ValueError(
            "no loss trains an image tower by itself: set model.text and "
            "train.losses=sigmoid, or model.vision.num_classes and "
            "train.losses=classification"
        )
    if config.init_towers and config.init is None:
        raise ValueError(
            "init_towers=true takes the towers of the weights in init, and init is not "
            "set: give init=PATH, or set init_towers=false"
        )
    tower = config.model.text
    if tower is not None and config.train.needs("captions"):
        tokens.check_vocabulary(tower.tokenizer, tower.vocab_size)
    for name in ("vision_lr", "text_lr"):
        if getattr(config.optim, name) == 0 and config.init is None:
            raise ValueError(
                f"optim.{name}=0 freezes a tower whose weights are random: start from "
                "trained weights with init=PATH, or train the tower"
            )
    if config.optim.warmup_steps >= config.train.steps and not config.optim.start:
        log.warning(
            "optim.warmup_steps=%d is more than train.steps=%d: the warm-up is cut to "
            "%d steps",
            config.optim.warmup_steps,
            config.train.steps,
            config.train.steps - 1,
        )


def check_split(config: Config, source: Source, held: int) -> None:
    """Warns if more than half of a folder is held out.

    Args:
      source: the training data.
      held: how many images `data.eval` has.
    """
    train, folder = config.data.train, config.data.eval
    if not (isinstance(train, Folder) and isinstance(folder, Folder)):
        return
    splits_one = (train.split, folder.split) == ("train", "eval")
    if splits_one and folder.path in (None, train.path) and held > len(source):
        log.warning(
            "data.eval.holdout=%g takes %d of %d images, since a hash of each name "
            "decides: set data.train.holdout and data.eval.holdout to another share",
            folder.holdout,
            held,
            len(source) + held,
        )


def check_captions(config: Config, source: Source) -> None:
    """Warns if captions are longer than the text tower takes."""
    if config.model.text is not None and config.train.needs("captions"):
        captions = _some_captions(source)
        tower = config.model.text
        cut = tokens.share_cut(captions, tower.length, tower.tokenizer)
        if cut:
            log.warning(
                "%.1f %% of the captions are longer than model.text.length=%d and are "
                "truncated",
                100 * cut,
                tower.length,
            )


def _some_captions(source: Source) -> list[str]:
    """Captions of a few hundred records, in runs that storage can read at once."""
    starts = np.linspace(0, max(0, len(source) - _RUN), _RUNS).astype(int)
    runs = np.minimum(starts[:, None] + np.arange(_RUN), len(source) - 1)
    indices = np.unique(runs).tolist()
    captions: list[str] = []
    for i in indices:
        with contextlib.suppress(ValueError, OSError):  # training counts such records
            captions += source.record(i).captions
    return captions


def check_devices(config: Config, rules: Rules) -> None:
    """Refuses a config that the devices of the current mesh cannot share or run.

    Raises:
      ValueError: if the rows, in whole groups, or a parameter cannot be split evenly,
        or if a kernel or dtype is chosen that does not run here.
    """
    _check_rows(config, rules.size("batch"))
    check_parameters(config, rules)
    if config.model.dtype == "bfloat16" and not multiplies_bfloat16():
        raise ValueError(
            "model.dtype=bfloat16 needs a GPU of compute capability 8.0 (Ampere) or "
            f"later, and this one has {compute_capability()}: use model.dtype=auto"
        )
    name = config.model.attention
    channels = config.model.vision.width // rules.size("tensor")
    if why := misfit(name, config.data.row_tokens, channels, platform()):
        raise ValueError(f"model.attention={name} {why}: use model.attention=auto")


def check_parameters(config: Config, rules: Rules) -> None:
    """Raises ValueError for sizes that cannot be split over the devices."""
    for tower in ("vision", "text"):
        sizes = getattr(config.model, tower)
        for axis, field, devices in (
            ("fsdp", "width", rules.size("embed")),
            ("tensor", "num_heads", rules.size("tensor")),
            ("tensor", "mlp_dim", rules.size("tensor")),
        ):
            if sizes and getattr(sizes, field) % devices:
                raise ValueError(
                    f"model.{tower}.{field}={getattr(sizes, field)} cannot be split "
                    f"over mesh.{axis}={devices}: choose a divisor"
                )


def _check_rows(config: Config, devices: int) -> None:
    rows, group = config.data.rows, config.data.caption_rows
    if rows % devices:
        raise ValueError(
            f"data.rows={rows} is not divisible by {devices} devices: "
            "change it, or set mesh.data and mesh.fsdp to use fewer"
        )
    parts = config.train.microbatches
    if rows // devices % ((group or 1) * parts):
        raise ValueError(
            f"data.rows={rows} over {devices} devices is {rows // devices} rows each, "
            f"which train.microbatches={parts} cannot split into whole groups of "
            f"data.caption_rows={group or 1}: change one of them, or use fewer devices "
            "(mesh.data, mesh.fsdp)"
        )
