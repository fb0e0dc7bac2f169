"""Sends the training log to TensorBoard and Weights & Biases too."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from navit import config as config_lib
from navit.config import Config
from navit.files import write_atomic
from navit.train.metrics import MetricsWriter, Values

# The values of `train.log_to`, and the package that each needs.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Writer(Protocol):
    """Takes the values of a logged step, including "step"."""

    def write(self, metrics: Values) -> None: ...

    def close(self) -> None: ...


def check_installed(config: Config) -> None:
    """Raises ValueError if a package that `train.log_to` needs is not installed."""
    for name in config.train.log_to:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"train.log_to={name} needs {package}, which is not installed: pip "
                f"install {package}"
            )


def open_writers(config: Config, workdir: Path, start_step: int) -> list[Writer]:
    """Opens metrics.jsonl and the trackers in `train.log_to`."""
    writers: list[Writer] = [MetricsWriter(workdir / "metrics.jsonl", start_step)]
    if "tensorboard" in config.train.log_to:
        writers.append(_TensorBoard(workdir / "tensorboard", start_step))
    if "wandb" in config.train.log_to:
        writers.append(_WandB(config, workdir, start_step))
    return writers


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        # Hides what was logged after the step that the run resumes from.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, metrics: Values) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run named after the work directory, which keeps its id to resume it.

    Project, entity and mode come from wandb's own variables: WANDB_PROJECT,
    WANDB_ENTITY, WANDB_MODE=offline.
    """

    def __init__(self, config: Config, workdir: Path, start_step: int) -> None:
        import wandb

        id_file = workdir / "wandb_id"
        # A run that starts from step 0 gets a new id.
        old = id_file.read_text().strip() if start_step and id_file.exists() else None
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "navit"),
            name=workdir.resolve().name,
            id=old,
            resume="allow",
            dir=str(workdir),
            config=config_lib.to_json(config),
        )
        write_atomic(id_file, f"{self._run.id}\n".encode())

    def write(self, metrics: Values) -> None:
        step = int(metrics["step"])
        self._run.log({k: v for k, v in metrics.items() if k != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()
