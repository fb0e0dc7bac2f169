"""The configuration of a run: frozen dataclasses.

A config is only data. Each file in `configs/` defines `get_config() -> Config`; `load`
reads one and applies `key.path=value` overrides. The whole tree is saved with the
checkpoint, and evaluation rebuilds the model from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from navit.config.data import DataConfig
from navit.config.evaluation import EvalConfig
from navit.config.losses import Loss, Need, Sigmoid
from navit.config.model import ModelConfig
from navit.config.optim import OptimConfig
from navit.config.overrides import override, positive
from navit.plan.strategies.views import check_patch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training length, loss, and how often to log and save (in steps).

    `losses`: the parts of the loss, each at most once; none for a model that no loss
    can train: a tower without a text tower and without classes.
    `microbatches`: the towers take a device's rows in this many parts, one after
    another, and recompute each part's activations for its gradient: less memory for a
    third more work. The loss is still over the whole batch.
    `keep`: how many of the latest checkpoints stay; with `keep_every`, so do those of
    steps that it divides, a multiple of `checkpoint_every`.
    `log_to`: where the training log goes besides metrics.jsonl and the terminal.
    `check_kernels`: on an accelerator, compare the kernels with the plain path before
    the first step, and use the plain path in place of one that fails there.
    `on_nonfinite`: "stop" ends the run at the first loss or gradient that is not
    finite, before it reaches the weights; "skip:N" leaves out up to N such updates and
    counts them in the log.
    `profile_steps`: "100:103" writes a trace of steps 100, 101 and 102 to
    WORKDIR/profile.
    """

    # Former names of fields, for the error that an override of one gets.
    renamed: ClassVar = {
        "loss": "losses",
        "loss_implementation": "losses.sigmoid.implementation",
    }

    steps: int = 1000
    losses: tuple[Loss, ...] = (Sigmoid(),)
    microbatches: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    keep_every: int | None = None
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    profile_steps: str | None = None
    check_kernels: bool = True
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        positive(self, "steps", "log_every", "checkpoint_every", "keep")
        positive(self, "microbatches")
        if self.keep_every is not None and (
            self.keep_every < 1 or self.keep_every % self.checkpoint_every
        ):
            raise ValueError(
                f"train.keep_every={self.keep_every} is not a multiple of "
                f"train.checkpoint_every={self.checkpoint_every}, so those steps are "
                "not saved: change one of them"
            )
        _ = self.skips  # checks its form
        names = [part.short for part in self.losses]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"train.losses={','.join(names)} names {repeated[0]} "
                f"{len(repeated)} times: name it once, with a weight, such as "
                f"{repeated[0]}:{len(repeated)}"
            )
        for part in self.losses:
            if not 0 < part.weight < float("inf"):
                raise ValueError(
                    f"train.losses.{part.short}.weight must be positive, not "
                    f"{part.weight}"
                )
        window = self.profile_window
        if window and not 1 <= window[0] < window[1] <= self.steps + 1:
            raise ValueError(
                f"profile_steps={self.profile_steps} is empty or not within steps 1 to "
                f"{self.steps}: the first comes before the last, which is not traced"
            )

    def needs(self, what: Need) -> bool:
        """Whether a part of the loss needs this."""
        return any(what in part.needs for part in self.losses)

    @property
    def skips(self) -> int:
        """How many updates that are not finite the run may leave out."""
        word, _, number = self.on_nonfinite.partition(":")
        if self.on_nonfinite == "stop":
            return 0
        if word == "skip" and number.isdecimal() and int(number) > 0:
            return int(number)
        raise ValueError(
            f'on_nonfinite must be stop or skip:N, as "skip:10", not '
            f"{self.on_nonfinite!r}"
        )

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The first step to trace, and the first step after the trace."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(
                'profile_steps must be FIRST:LAST, as "100:103", not '
                f"{self.profile_steps!r}"
            )
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 takes the rest.

    `fsdp` also shards the parameters and their moments, `tensor` shards heads and MLPs;
    both belong on the fast network of one slice. `slices` TPU slices (pods) lie along
    `data`. If all sizes are given, the first devices of a single host are used.
    `gradients`: the dtype in which devices sum gradients; bfloat16 halves the bytes.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    gradients: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        positive(self, "slices")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    `init`: weights to start from (anything `navit.load` takes). `model.vision` and
    `model.text` must describe their towers.
    `init_towers`: the run takes the towers of `init` in place of `model.vision` and
    `model.text`; a `model.text` of None stays None. Settings of the towers on the
    command line, such as `model.text.tokenizer=gemma.model`, still apply.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    init: str | None = None
    init_towers: bool = False

    def __post_init__(self) -> None:
        if self.init == "":
            raise ValueError("init is empty: set init=PATH, or init=none")
        _check_losses(self)
        _check_strategy(self)
        most = self.data.most_tokens(self.model.vision.patch_size)
        if most > self.data.row_tokens:
            raise ValueError(
                f"data.sides.high={self.data.sides and self.data.sides.high} makes "
                f"images of {most} tokens, more than a row of data.row_tokens="
                f"{self.data.row_tokens}: lower one or raise the other"
            )


def _check_strategy(config: Config) -> None:
    """Raises ValueError if the model cannot take the strategy's views."""
    strategy, vision = config.data.strategy, config.model.vision
    if strategy is None:
        return
    if not config.init_towers:  # else the tower is not known yet
        check_patch(strategy, vision.patch_size)
    if vision.fixed_grid:
        raise ValueError(
            "model.vision.fixed_grid takes every image at one grid, so it has no use "
            "for data.strategy: set fixed_grid to false, or leave the strategy out"
        )


def _check_losses(config: Config) -> None:
    """Raises ValueError where the model or the data lack what a part needs."""
    vision, data = config.model.vision, config.data
    if not config.train.losses and (config.model.text or vision.num_classes):
        raise ValueError("train.losses is empty: name one part, such as sigmoid")
    for part in config.train.losses:
        name = f"train.losses={part.short}"
        if "text_tower" in part.needs and config.model.text is None:
            raise ValueError(f"{name} needs a text tower: set model.text")
        if "text_tower" in part.needs and vision.pool == "none":
            raise ValueError(
                f"{name} needs one vector for each image, and model.vision.pool=none "
                "gives none: choose another pool"
            )
        if "classifier" in part.needs and not vision.num_classes:
            raise ValueError(
                f"{name} needs a classifier: set model.vision.num_classes to the "
                "number of classes of data.train (`navit index CONFIG` without this "
                "loss prints it)"
            )
    if data.caption_rows is not None and not config.train.needs("captions"):
        names = ",".join(part.short for part in config.train.losses)
        raise ValueError(
            f"data.caption_rows={data.caption_rows} groups captions, but "
            f"train.losses={names} reads none: leave it at none"
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Runs `get_config()` of a Python file and applies `key.path=value` overrides."""
    config = run_file(path, "get_config", Config)
    return override(config, overrides)


def run_file(path: str | Path, function: str, kind: type[T]) -> T:
    """What a function of a Python file returns.

    Raises:
      FileNotFoundError, ValueError: if there is no such file or function, it fails, or
        returns something else than a `kind`.
    """
    path = Path(path)
    if not path.is_file():
        known = [*path.parent.glob("*.py"), *Path("configs").glob("*.py")]
        names = {p.stem: p for p in reversed(known)}
        near = difflib.get_close_matches(path.stem, names, 1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise FileNotFoundError(f"there is no config {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"navit_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(
                f"{path} defines no {function}() -> navit.config.{kind.__name__}"
            )
        value = getattr(module, function)()
    except (TypeError, SyntaxError, ImportError, NameError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(
            f"{path}: {function}() returned {value!r}, not a {kind.__name__}"
        )
    return value
