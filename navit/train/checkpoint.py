"""Checkpoints of the state and its config. The only file that knows orbax."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from navit import config as config_lib
from navit.config import Config
from navit.sharding import place_of
from navit.train import checksums, hosts
from navit.train.state import TrainState

log = logging.getLogger("navit")

# Raised when what a checkpoint holds changes; others are refused by number. Format 2
# has the same model, no checksums, and weight decay of another meaning.
FORMAT = 3
_SAME_MODEL = 2

_FOLDER = "checkpoints"
_PARTIAL = ".partial"


def is_workdir(path: Path) -> bool:
    return (path / _FOLDER).is_dir()


class Checkpoints:
    """The checkpoints of one work directory.

    Each holds the model, the optimizer's state and the config, under its step, and the
    checksums of its files, which every read verifies. A folder is named by its step
    only when all of it is written: a run killed while saving keeps the one before.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None) -> None:
        self._path, self._keep = workdir, keep
        self._folder = workdir.absolute() / _FOLDER
        if keep is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        elif not self._folder.is_dir():
            raise FileNotFoundError(
                f"{workdir} is not a navit work directory: it has no {_FOLDER}/"
            )
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._verified: int | None = None

    def latest_step(self) -> int | None:
        """The last one that is on disk, or on its way there."""
        return self._saving[0] if self._saving else max(self._steps(), default=None)

    def save(self, state: TrainState, config: Config, data: str) -> None:
        """Starts writing; returns before it is on disk (`close` waits).

        Args:
          data: the fingerprint of the data it is trained on.

        Raises:
          OSError: if this one or the one before cannot be written.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        config_json = config_lib.to_json(config)
        about = {"format": FORMAT, "config": config_json, "data": data}
        self._write(step, about, model=state.model, opt_state=state.opt_state)

    def save_model(self, model: Any, config: Config) -> None:
        """Writes weights that were not trained here, as step 0."""
        about = {"format": FORMAT, "config": config_lib.to_json(config), "data": ""}
        self._write(0, about, model=model)

    def _write(self, step: int, about: dict[str, Any], **trees: Any) -> None:
        self._wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        partial = self._folder / f"{step}{_PARTIAL}"
        if hosts.first():
            for left in self._folder.glob(f"*{_PARTIAL}*"):  # by a run that was killed
                shutil.rmtree(left)
        hosts.any_of(False)
        try:
            self._checkpointer.save(
                partial,
                args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items),
            )
        except Exception as error:  # tensorstore's are of many types
            raise self._unwritten(step, error) from error
        self._saving = step, self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        if hosts.first():
            partial = self._folder / f"{step}{_PARTIAL}"
            checksums.write(partial)
            partial.rename(self._folder / str(step))
            for old in self._steps()[: -(self._keep or 1)]:
                shutil.rmtree(self._folder / str(old))

    def _wait(self) -> None:
        if self._saving:
            (step, future), self._saving = self._saving, None
            try:
                future.result()
            except Exception as error:  # tensorstore's are of many types
                raise self._unwritten(step, error) from error

    def _unwritten(self, step: int, error: Exception) -> OSError:
        """What to tell a user: tensorstore's own words take a screen."""
        why = str(error).partition("\n")[0]
        if os.strerror(errno.ENOSPC) in str(error):
            why = os.strerror(errno.ENOSPC)
        safe = max(self._steps(), default=None)
        kept = "no step is saved" if safe is None else f"step {safe} is safe"
        return OSError(
            f"cannot write the checkpoint {self._folder / str(step)} ({why}); {kept}: "
            "make room, or mend what is wrong, and run the same command again"
        )

    def set_damaged_aside(self) -> int | None:
        """The latest step whose files are as they were written; None without any.

        Damaged ones after it are moved to WORKDIR/damaged. Collective: process 0 reads
        the files, for all.

        Raises:
          ValueError: if there are checkpoints and none is whole.
        """
        if hosts.first():
            steps = self._steps()
            damaged = {}
            while steps and (what := self._damage(steps[-1])):
                damaged[steps.pop()] = what
            if damaged and not steps:
                step, what = next(iter(damaged.items()))
                raise ValueError(
                    f"step {step} of {self._path} is damaged ({what}), and there is no "
                    "earlier one that is whole: put a copy back, or choose another "
                    "--workdir"
                )
            for step, what in damaged.items():
                aside = self._set_aside(step)
                log.warning(
                    "step %d is damaged (%s): going on from step %d; it is kept in %s",
                    *(step, what, steps[-1], aside),
                )
        hosts.any_of(False)
        self._verified = self.latest_step()
        return self._verified

    def _set_aside(self, step: int) -> Path:
        aside, others = self._path / "damaged" / str(step), 0
        while aside.exists():
            others += 1
            aside = aside.with_name(f"{step}.{others}")
        aside.parent.mkdir(exist_ok=True)
        return (self._folder / str(step)).rename(aside)

    def _damage(self, step: int) -> str | None:
        folder = self._folder / str(step)
        if not (folder / checksums.NAME).exists() and self._is_older(folder):
            return None
        return checksums.damage(folder)

    def _is_older(self, folder: Path) -> bool:
        """Whether it is of a format that has no checksums."""
        try:
            about = json.loads((folder / "about/metadata").read_text())
            return about["format"] == _SAME_MODEL
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _steps(self) -> list[int]:
        names = (path.name for path in self._folder.iterdir())
        return sorted(int(name) for name in names if name.isdecimal())

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
        about = self._restore(items)["about"]
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
        """The latest state, placed as `like` (from `jax.eval_shape`) is sharded.

        Raises:
          ValueError: if it is damaged, or not finite.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(_concrete(like.model)),
            opt_state=ocp.args.StandardRestore(_concrete(like.opt_state)),
        )
        found = self._restore(items)
        self._check_finite({"model": found["model"], "opt_state": found["opt_state"]})
        counter = jax.device_put(
            jnp.full((), self._latest(), like.step.dtype),
            _concrete(like.step).sharding,
        )
        return TrainState(counter, found["model"], found["opt_state"])

    def restore_model(self, like: Any) -> tuple[Any, int]:
        """The latest model alone, and its step; raises as `restore`."""
        items = ocp.args.Composite(model=ocp.args.StandardRestore(_concrete(like)))
        model = self._restore(items)["model"]
        self._check_finite({"model": model})
        return model, self._latest()

    def close(self) -> None:
        """Waits until everything is on disk; raises as `save`."""
        try:
            self._wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def _restore(self, items: ocp.args.Composite) -> Any:
        step = self._latest()
        folder = self._folder / str(step)
        if step != self._verified and (what := self._damage(step)):
            raise ValueError(
                f"step {step} of {self._path} is damaged ({what}): navit train sets it "
                f"aside and goes on from the step before; move {folder} away to read "
                "that one"
            )
        self._verified = step
        return self._checkpointer.restore(folder, args=items)

    def _check_finite(self, tree: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        finite = jax.jit(lambda xs: [jnp.isfinite(x).all() for x in xs])
        found = finite([leaf for _, leaf in leaves])
        for (path, _), is_finite in zip(leaves, found, strict=True):
            if not is_finite:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                folder = self._folder / str(self._latest())
                raise ValueError(
                    f"{folder}: {name.removesuffix('.value')} is NaN or infinite: move "
                    "it away to use the step before, or train again with a lower "
                    "optim.lr"
                )

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self._path} has no finished checkpoint yet")
        return step


def quiet_orbax() -> None:
    """Keeps its threads' tracebacks of a failed write off the terminal, for good.

    `save` and `close` raise the error, and once is enough.
    """
    before = sys.unraisablehook

    def is_other(record: logging.LogRecord) -> bool:
        about = record.pathname + record.getMessage()
        return record.levelno < logging.ERROR or "orbax" not in about

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(is_other)
    sys.unraisablehook = hook


def _concrete(tree: Any) -> Any:
    """Abstract leaves -> the same with shardings of real devices, which orbax needs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(x)), tree
    )
