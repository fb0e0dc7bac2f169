"""Saves and restores checkpoints. The only file that uses orbax."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from navit import config as config_lib
from navit.config import Config
from navit.sharding import place_of
from navit.train import checksums, hosts
from navit.train.remote_workdir import Remote
from navit.train.state import TrainState
from navit.train.workdir import FOLDER, outdated, set_aside, steps

log = logging.getLogger("navit")

# Incremented when the contents of a checkpoint change. Format 2 has the same model, but
# no checksums, and its `optim.weight_decay` means something else.
FORMAT = 3
_SAME_MODEL = 2

_PARTIAL = ".partial"

# How often processes tell one another whether their parts are written.
_TELL_SECONDS = 0.5

# Warnings of orbax about files that no other process sees.
_EXPECTED = ("Skipping merge of OCDBT", "for `primary_host=None`")

# What a failed write is put down to, if its message has it.
_CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class Checkpoints:
    """The checkpoints of one work directory.

    Each holds the model, the optimizer state, the moving average of the weights if the
    run has one, the config, and checksums of its files. Every read verifies the files
    that it needs. A folder is named after its step only once all of it is written, so a
    run that is killed while saving keeps the previous checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        remote: Remote | None = None,
    ) -> None:
        """Opens the checkpoints of a work directory.

        Args:
          keep: as in `TrainConfig`; None only reads.
          keep_every: as in `TrainConfig`.
          remote: where they are sent, if `workdir` is this process's copy of a URL.
        """
        self._remote, self.shared = remote, remote is None
        self._path, self._keep, self._keep_every = workdir, keep, keep_every
        self._folder = workdir.absolute() / FOLDER
        if keep is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        elif not self._folder.is_dir():
            raise FileNotFoundError(
                f"{workdir} is not a navit work directory: it has no {FOLDER}/"
            )
        self._checkpointer = _checkpointer(shared=remote is None)
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._verified: int | None = None
        self._abandoned = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if hosts.is_lost(error):
            self._abandon()
        self.close()

    def below(self, folder: str) -> Checkpoints:
        """Writes one checkpoint in a folder of this work directory."""
        remote = self._remote and self._remote.below(folder)
        return Checkpoints(self._path / folder, keep=1, remote=remote)

    def latest_step(self) -> int | None:
        """The latest step that is on disk or being written."""
        return (
            self._saving[0] if self._saving else max(steps(self._folder), default=None)
        )

    def save(self, state: TrainState, config: Config, data: str) -> None:
        """Starts writing a checkpoint; `wait` waits until it is on disk.

        Args:
          data: the fingerprint of the training data.

        Raises:
          OSError: if this checkpoint or the previous one cannot be written.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        config_json = config_lib.to_json(config)
        about = {"format": FORMAT, "config": config_json, "data": data}
        about["skipped"] = int(state.skipped)
        average = {} if state.ema is None else {"ema": state.ema}
        self._write(
            step, about, model=state.model, opt_state=state.opt_state, **average
        )

    def save_model(self, model: Any, config: Config) -> None:
        """Writes a model without an optimizer state, as step 0."""
        about = {"format": FORMAT, "config": config_lib.to_json(config), "data": ""}
        self._write(0, about, model=model)

    def _write(self, step: int, about: dict[str, Any], **trees: Any) -> None:
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        partial = self._folder / f"{step}{_PARTIAL}"
        if hosts.first() or self._remote is not None:
            for leftover in self._folder.glob(f"*{_PARTIAL}*"):  # of a killed run
                shutil.rmtree(leftover)
        hosts.any_of(False)  # a barrier
        try:
            self._checkpointer.save(
                partial,
                args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items),
            )
        except Exception as error:  # tensorstore raises many types
            raise self._unwritten(step, error) from error
        self._saving = step, self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        partial, keep, every = (
            self._folder / f"{step}{_PARTIAL}",
            self._keep or 1,
            self._keep_every,
        )
        if self._remote is not None:
            self._remote.publish(partial, step, keep, every)
            keep, every = 1, None  # of the copy, which only this process has
        elif hosts.first():
            checksums.write(partial)
        if self._remote is not None or hosts.first():
            partial.rename(self._folder / str(step))
            for old in outdated(steps(self._folder), keep, every):
                shutil.rmtree(self._folder / str(old))

    def failed(self) -> bool:
        """Whether the last checkpoint cannot be written; `save` and `wait` say why."""
        future = self._saving[1] if self._saving else None
        return future is not None and future.done() and future.exception() is not None

    def wait(self) -> None:
        """Waits until everything is on disk; raises the same errors as `save`.

        Collective: if one process fails, all raise, since they wait for one another.
        """
        if not self._saving:
            return
        (step, future), self._saving = self._saving, None
        several = jax.process_count() > 1
        while True:
            concurrent.futures.wait([future], _TELL_SECONDS if several else None)
            is_done = future.done()
            error = future.exception() if is_done else None
            told = hosts.gather(np.array([is_done, error is not None]))
            if told[:, 1].any():
                break
            if told[:, 0].all():
                return
        why = "" if error is None else str(self._unwritten(step, error))
        reasons = [text for text in hosts.gather_texts(why) if text]
        if several:
            self._abandon()
        raise OSError(why or reasons[0]) from error

    def _abandon(self) -> None:
        """Ends all waiting, as another process cannot write its part."""
        self._saving, self._abandoned = None, True
        if self._remote is not None:
            self._remote.give_up()

    def _unwritten(self, step: int, error: BaseException) -> OSError:
        """A one-line error for users; tensorstore's own message fills a screen."""
        why = str(error).partition("\n")[0]
        for cause in map(os.strerror, _CAUSES):
            why = cause if cause in str(error) else why
        safe = max(steps(self._folder), default=None)
        status = "no step is saved" if safe is None else f"step {safe} is safe"
        return OSError(
            f"cannot write the checkpoint {self._folder / str(step)} ({why}); "
            f"{status}: free some space or fix the cause, then run the same command "
            "again"
        )

    def set_damaged_aside(self) -> int | None:
        """Moves damaged checkpoints aside; returns the latest intact step, if any.

        Those after the latest intact one go to WORKDIR/damaged. Collective: process 0
        reads the files for all.

        Raises:
          ValueError: if there are checkpoints but none is intact.
        """
        if hosts.first() or self._remote is not None:
            intact = steps(self._folder)
            damaged = {}
            while intact and (what := self._damage(intact[-1])):
                damaged[intact.pop()] = what
            if damaged and not intact:
                step, what = next(iter(damaged.items()))
                raise ValueError(
                    f"step {step} of {self._path} is damaged ({what}), and no earlier "
                    "checkpoint is intact: restore a copy, or choose another --workdir"
                )
            for step, what in damaged.items():
                aside = set_aside(self._path, step)
                if self._remote is not None:
                    self._remote.set_aside(step)
                log.warning(
                    "step %d is damaged (%s): resuming from step %d; its files are now "
                    "in %s",
                    step,
                    what,
                    intact[-1],
                    aside,
                )
        hosts.any_of(False)  # a barrier
        self._verified = self.latest_step()
        return self._verified

    def _damage(self, step: int, parts: Iterable[str] | None = None) -> str | None:
        folder = self._folder / str(step)
        try:
            about = json.loads((folder / "about/metadata").read_text())
            other_format = about["format"] != FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            other_format = False
        if other_format and not (folder / checksums.NAME).exists():
            return None  # older formats have no checksums; `_about` judges them
        return checksums.damage(folder, parts)

    def config(self) -> Config:
        """The config of the latest checkpoint; raises the same errors as `data`.

        If the tokenizer's file is gone, the copy in the work directory replaces it.
        """
        config = config_lib.from_json(self._about(FORMAT, _SAME_MODEL)["config"])
        text = config.model.text
        if text is None or text.tokenizer in (None, "bytes"):
            return config
        beside = self._path / Path(text.tokenizer).name
        if Path(text.tokenizer).expanduser().is_file() or not beside.is_file():
            return config
        return config_lib.override(config, [f"model.text.tokenizer={beside}"])

    def data(self) -> str:
        """The fingerprint of the data that the latest checkpoint was trained on.

        Raises:
          FileNotFoundError: if there is no checkpoint yet.
          ValueError: if the checkpoint has another format.
        """
        return self._about(FORMAT)["data"]

    def _about(self, *formats: int) -> dict[str, Any]:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = self._restore(items)["about"]
        stored_format = about.get("format")
        if stored_format not in formats:
            remedy = "train into another --workdir"
            if stored_format == _SAME_MODEL:
                remedy = f"start from its weights with init={self._path} and {remedy}"
            raise ValueError(
                f"{self._path} has checkpoints of format {stored_format}, but this "
                f"version of navit resumes from format {FORMAT}: {remedy}, or use the "
                "version that wrote them"
            )
        return about

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, sharded as `like` is (the result of `jax.eval_shape`).

        Raises:
          ValueError: if a file is damaged, or a value is NaN or infinite.
        """
        trees = {"model": like.model, "opt_state": like.opt_state}
        if like.ema is not None:
            trees["ema"] = like.ema
        restored = self._restore_trees(trees)
        step = _scalar(self._latest(), like.step)
        skipped = _scalar(self._about(FORMAT).get("skipped", 0), like.skipped)
        return TrainState(
            step,
            restored["model"],
            restored["opt_state"],
            skipped,
            restored.get("ema"),
        )

    def restore_model(self, like: Any, *, raw: bool = False) -> tuple[Any, int]:
        """The latest model and its step, without the optimizer state.

        Raises the same errors as `restore`.

        Args:
          raw: the weights that training updates, also if the run has a moving average
            of them.
        """
        name = "model" if raw or not self.has_average() else "ema"
        return self._restore_trees({name: like})[name], self._latest()

    def has_average(self) -> bool:
        """Whether the latest checkpoint has a moving average of the weights."""
        return (self._folder / str(self._latest()) / "ema").is_dir()

    def _restore_trees(self, like: dict[str, Any]) -> dict[str, Any]:
        items = {
            name: ocp.args.StandardRestore(_concrete(tree))
            for name, tree in like.items()
        }
        restored = self._restore(ocp.args.Composite(**items))
        trees = {name: restored[name] for name in like}
        self._check_finite(trees)
        return trees

    def close(self) -> None:
        """Waits for this process's part; raises the same errors as `save`."""
        saving, self._saving = self._saving, None
        try:
            if saving and (error := saving[1].exception()):
                raise self._unwritten(saving[0], error) from error
        finally:
            self._background.shutdown(wait=not self._abandoned)
            if not self._abandoned:
                self._checkpointer.close()

    def _restore(self, items: ocp.args.Composite) -> Any:
        step = self._latest()
        folder = self._folder / str(step)
        if step != self._verified and (what := self._damage(step, items)):
            earlier = (
                f"navit train moves it aside and resumes from the step before; move "
                f"{folder} away to read that step"
            )
            if len(steps(self._folder)) == 1:
                earlier = "there is no earlier checkpoint: restore a copy"
            raise ValueError(
                f"step {step} of {self._path} is damaged ({what}): {earlier}"
            )
        try:
            return self._checkpointer.restore(folder, args=items)
        except Exception as error:  # tensorstore's are of many types
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"step {step} of {self._path} cannot be read ({reason}): move {folder} "
                "away to use the step before"
            ) from error

    def _check_finite(self, tree: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        finite = jax.jit(lambda xs: [jnp.isfinite(x).all() for x in xs])
        flags = finite([leaf for _, leaf in leaves])
        for (path, _), is_finite in zip(leaves, flags, strict=True):
            if not is_finite:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                folder = self._folder / str(self._latest())
                raise ValueError(
                    f"{folder}: {name.removesuffix('.value')} is NaN or infinite: move "
                    "this folder away to use the step before, or train again with a "
                    "lower optim.lr"
                )

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self._path} has no finished checkpoint yet")
        return step


def _checkpointer(*, shared: bool) -> ocp.AsyncCheckpointer:
    """Without a shared folder, each process writes files that no other needs to see."""
    if shared:
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    trees = {
        name: ocp.StandardCheckpointHandler(
            multiprocessing_options=alone, use_ocdbt=False
        )
        for name in ("model", "opt_state", "ema")
    }
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        **trees,
    )
    # Else a process writes as soon as any other has made its folders.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(
        handler, multiprocessing_options=alone, async_options=options
    )


def quiet_orbax() -> None:
    """Silences the tracebacks that orbax's threads print when a write fails.

    And the warnings that each process writes its own files, which a URL asks for, and
    that the rest of a failed write never ran. `save` and `close` raise the error. This
    lasts until the process ends.
    """
    before = sys.unraisablehook

    def is_other(record: logging.LogRecord) -> bool:
        about = record.pathname + record.getMessage()
        noise = record.levelno >= logging.ERROR or any(x in about for x in _EXPECTED)
        return not (noise and "orbax" in about)

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(is_other)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = hook


def _scalar(value: int, like: Any) -> jax.Array:
    place = _concrete(like).sharding
    return jax.device_put(jnp.full((), value, like.dtype), place)


def _concrete(tree: Any) -> Any:
    """Gives abstract leaves shardings over real devices, which orbax needs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(x)), tree
    )
