"""Checkpoints of the state and its config. The only file that knows orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from navit import config as config_lib
from navit.config import Config
from navit.sharding import place_of
from navit.train.state import TrainState

# Raised when what a checkpoint holds changes; others are refused by number. Format 2
# has the same model and another optimizer, with weight decay of another meaning.
FORMAT = 3
_SAME_MODEL = 2

_FOLDER = "checkpoints"


def is_workdir(path: Path) -> bool:
    return (path / _FOLDER).is_dir()


class Checkpoints:
    """The checkpoints of one work directory.

    Each holds the model, the optimizer's state and the config, under its step. Writes
    are atomic: a run killed while saving keeps the one before.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None
        )
        folder = workdir.absolute() / _FOLDER
        if keep is None and not folder.is_dir():
            raise FileNotFoundError(
                f"{workdir} is not a navit work directory: it has no {_FOLDER}/"
            )
        self._path = workdir
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, config: Config, data: str) -> None:
        """Starts writing; returns before it is on disk (`close` waits).

        Args:
          data: the fingerprint of the data it is trained on.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        config_json = config_lib.to_json(config)
        about = {"format": FORMAT, "config": config_json, "data": data}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.model),
            opt_state=ocp.args.StandardSave(state.opt_state),
            about=ocp.args.JsonSave(about),
        )
        self._manager.save(step, args=items)

    def save_model(self, model: Any, config: Config) -> None:
        """Writes weights that were not trained here, as step 0."""
        about = {"format": FORMAT, "config": config_lib.to_json(config), "data": ""}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model), about=ocp.args.JsonSave(about)
        )
        self._manager.save(0, args=items)

    def config(self) -> Config:
        """The config that the latest checkpoint was trained with; raises as `data`.

        Its tokenizer is the copy in the work directory where its own path is gone.
        """
        config = config_lib.from_json(self._about(FORMAT, _SAME_MODEL)["config"])
        text = config.model.text
        if text is None or text.tokenizer in ("", "bytes"):
            return config
        beside = self._path / Path(text.tokenizer).name
        if Path(text.tokenizer).expanduser().is_file() or not beside.is_file():
            return config
        return config_lib.override(config, [f"model.text.tokenizer={beside}"])

    def data(self) -> str:
        """The fingerprint of the data that it was trained on.

        Raises:
          FileNotFoundError: if there is no checkpoint yet.
          ValueError: if it is of another format.
        """
        return self._about(FORMAT)["data"]

    def _about(self, *formats: int) -> dict[str, Any]:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = self._manager.restore(self._latest(), args=items)["about"]
        found = about.get("format")
        if found not in formats:
            start = f"init={self._path} starts from its weights, with another --workdir"
            other = "train into another --workdir"
            raise ValueError(
                f"{self._path} holds checkpoints of format {found}, and this version "
                f"of navit trains on from format {FORMAT}: "
                f"{start if found == _SAME_MODEL else other}; or use the version that "
                "wrote it"
            )
        return about

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, placed as `like` (from `jax.eval_shape`) is sharded."""
        step = self._latest()
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(_concrete(like.model)),
            opt_state=ocp.args.StandardRestore(_concrete(like.opt_state)),
        )
        found = self._manager.restore(step, args=items)
        counter = jax.device_put(
            jax.numpy.full((), step, like.step.dtype), _concrete(like.step).sharding
        )
        return TrainState(counter, found["model"], found["opt_state"])

    def restore_model(self, like: Any) -> tuple[Any, int]:
        """The latest model alone, and its step."""
        step = self._latest()
        items = ocp.args.Composite(model=ocp.args.StandardRestore(_concrete(like)))
        return self._manager.restore(step, args=items)["model"], step

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self._path} has no finished checkpoint yet")
        return step


def _concrete(tree: Any) -> Any:
    """Abstract leaves -> the same with shardings of real devices, which orbax needs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(x)), tree
    )
