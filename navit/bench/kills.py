"""Kills short training runs, damages their checkpoints, and compares how they end.

  python -m navit.bench.kills
  python -m navit.bench.kills --kills 5 --damages 3 --out /tmp/kills
  python -m navit.bench.kills --kills 5 --damages 3 --workdir s3://bucket/kills

Each run is the command `navit train` in a process of its own, with the config below: 40
steps, and a checkpoint after each second one. It prints one line a check and exits with
1 if one fails. With `--workdir`, the work directories are below this URL, where only
checkpoints show how far a run is. A run that follows a killed one first waits for its
lock, 40 seconds.

* kill -9 at a random moment of a random step, and the same command again: the state
  after the last step must equal that of an undisturbed run to the bit, and the log must
  have the same losses.
* A random file of the latest checkpoint is cut, zeroed, deleted or has a bit flipped:
  the run must resume from the checkpoint before it, and end the same.
* A full disk and a read-only work directory must give an error of one line, and leave
  what was saved: the same command without the fault must end the same. The disk is full
  because no file may grow beyond 20 kB (prlimit). Not with `--workdir`.
* A second run in a work directory that is in use must be refused, and the first must
  end the same.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from navit.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    Synthetic,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from navit.sharding import Rules
from navit.sources.bucket import Bucket, is_url
from navit.train.checkpoint import Checkpoints
from navit.train.optim import make_optimizer
from navit.train.remote_workdir import Remote
from navit.train.state import TrainState, init_state
from navit.train.workdir import FOLDER

_STEPS, _EVERY = 40, 2
# Commands of util-linux. With the first, no file grows beyond 20 kB; with the second,
# root may not write where it has no permission.
_FULL = ["prlimit", "--fsize=20000"]
_UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


def get_config() -> Config:
    """This file is the config of the runs that it starts."""
    return Config(
        model=ModelConfig(
            vision=VisionConfig(width=32, depth=2, mlp_dim=64, num_heads=2),
            text=TextConfig(length=24, width=32, depth=1, mlp_dim=64, num_heads=2),
        ),
        data=DataConfig(
            train=Synthetic(size=200),
            eval=Synthetic(size=12, seed=1),
            budgets=(9, 16),
            row_tokens=40,
            rows=4,
            slots=4,
        ),
        optim=OptimConfig(warmup_steps=2, ema=0.9),
        train=TrainConfig(steps=_STEPS, log_every=1, checkpoint_every=_EVERY),
        eval=EvalConfig(budgets=(16,)),
    )


class Ended(NamedTuple):
    """A run that ended: its exit code and what it printed."""

    code: int
    output: str
    error: str


class Runs:
    """Starts runs of `get_config`, and compares how they end.

    Args:
      out: a folder for work directories, or for copies of those behind a URL.
      url: a URL to have work directories below.
    """

    def __init__(self, out: Path, url: str | None = None) -> None:
        self.out, self._url = out, url
        self._env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.whole = self.place("whole")
        ended = self.finish(self.start(self.whole))
        if ended.code:
            raise RuntimeError(f"the undisturbed run fails: {ended.error}")
        copy = self._here(self.whole)
        self._losses, self._state = _losses(copy), restored(copy)
        log = (copy / "metrics.jsonl").read_text().splitlines()
        self.seconds_per_step = json.loads(log[-1])["seconds_per_step"]

    def place(self, name: str) -> Path | str:
        """The work directory of this name."""
        return self.out / name if self._url is None else f"{self._url}/{name}"

    def _here(self, workdir: Path | str) -> Path:
        """The work directory, or a copy of one behind a URL."""
        if isinstance(workdir, Path):
            return workdir
        copy, bucket = self.out / workdir.rpartition("/")[2], Bucket(workdir)
        bucket.fetch(bucket.names(), copy)
        return copy

    def start(self, workdir: Path | str, *prefix: str) -> subprocess.Popen[str]:
        """Starts `navit train`, as the arguments of the command `prefix` if given."""
        navit = "import sys; from navit.cli import console; sys.exit(console())"
        command = [sys.executable, "-c", navit, "train", __file__]
        return subprocess.Popen(
            [*prefix, *command, "--workdir", str(workdir)],
            # The cache of programs would warn of a fault too.
            env=self._env | ({"JAX_ENABLE_COMPILATION_CACHE": "0"} if prefix else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Ended:
        output, error = process.communicate()
        return Ended(process.returncode, output, error)

    def interrupted(self, workdir: Path, until: int) -> None:
        """A run that was killed once it had saved the step `until` or a later one."""
        process = self.start(workdir)
        while process.poll() is None and last(workdir) < until:
            time.sleep(0.02)
        process.kill()
        process.communicate()

    def ends_the_same(self, workdir: Path | str) -> str:
        """Runs to the end; returns what is wrong with the result, or nothing."""
        ended = self.finish(self.start(workdir))
        if ended.code:
            return f"exit code {ended.code}: {ended.error.strip()}"
        return self.difference(workdir)

    def difference(self, workdir: Path | str) -> str:
        """How a finished run differs from the undisturbed one, if it does."""
        copy = self._here(workdir)
        if _losses(copy) != self._losses:
            return "the log has other losses"
        a, b = jax.tree.leaves(restored(copy)), jax.tree.leaves(self._state)
        same = len(a) == len(b) and all(map(np.array_equal, a, b))
        return "" if same else "other weights"


def last(workdir: Path | str) -> int:
    """The latest finished checkpoint, or 0."""
    return max(Remote(files_of(workdir), Path()).steps(), default=0)


def files_of(workdir: Path | str) -> Bucket:
    return Bucket(workdir if isinstance(workdir, str) else f"file://{workdir}")


def restored(workdir: Path) -> TrainState:
    """The latest state of a run of `get_config`."""
    config = get_config()
    optimizer = make_optimizer(config.optim, config.train.steps)
    like = jax.eval_shape(functools.partial(init_state, config, optimizer, Rules()))
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def kill(runs: Runs, workdir: Path | str, rng: random.Random) -> tuple[str, str]:
    """Kills a run at a random moment; what is wrong then, and where it was."""
    process = runs.start(workdir)
    step = rng.randrange(_STEPS)
    while process.poll() is None and _progress(workdir) < step:
        time.sleep(0.001)
    steps = _EVERY if is_url(workdir) else 1  # to the next that can be seen
    time.sleep(rng.uniform(0, steps * runs.seconds_per_step))
    process.kill()
    process.communicate()
    where = f"after step {_progress(workdir)}, {last(workdir)} saved"
    files = files_of(workdir)
    saved = {str(step) for step in Remote(files, Path()).steps()}
    if {name.split("/")[1] for name in files.names(FOLDER)} - saved:
        where += ", the next being written"
    return runs.ends_the_same(workdir), where


def damage(runs: Runs, workdir: Path | str, rng: random.Random) -> tuple[str, str]:
    """Damages a file of the latest checkpoint; what is wrong then, and the damage."""
    whole, files = files_of(runs.whole), files_of(workdir)
    for name in whole.names():
        files.write(name, whole.read(name) or b"")
    folder = f"{FOLDER}/{_STEPS}"
    name = rng.choice([x for x in files.names(folder) if files.read(x)])
    data = files.read(name) or b""
    how = rng.choice(["cut", "zeroed", "flipped", "deleted"])
    at = rng.randrange(len(data))
    if how == "cut":
        files.write(name, data[:at])
    elif how == "zeroed":
        files.write(name, bytes(len(data)))
    elif how == "flipped":
        bit = bytes([data[at] ^ 1 << rng.randrange(8)])
        files.write(name, data[:at] + bit + data[at + 1 :])
    else:
        files.remove(name)
    what = f"{name.removeprefix(f'{folder}/')} {how}"
    ended = runs.finish(runs.start(workdir))
    if ended.code:
        return f"exit code {ended.code}: {ended.error.strip()}", what
    if f"resuming from step {_STEPS - _EVERY}" not in ended.output + ended.error:
        return "it did not resume from the step before", what
    return runs.difference(workdir), what


def full_disk(runs: Runs, workdir: Path) -> tuple[str, str]:
    """Resumes a run on a full disk; what is wrong then, and the error."""
    runs.interrupted(workdir, until=_STEPS // 4)
    return _recovers(runs, workdir, errno.EFBIG, _FULL)


def read_only(runs: Runs, workdir: Path) -> tuple[str, str]:
    """Resumes a run that may not write; what is wrong then, and the error."""
    runs.interrupted(workdir, until=_STEPS // 4)
    folders = [workdir, *(path for path in workdir.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    prefix = [] if os.getuid() else _UNPRIVILEGED
    return _recovers(runs, workdir, errno.EACCES, prefix)


def _recovers(
    runs: Runs, workdir: Path, error: int, prefix: Sequence[str]
) -> tuple[str, str]:
    """Resumes a run with a fault, then without: one line, and nothing lost."""
    saved = last(workdir)
    ended = runs.finish(runs.start(workdir, *prefix))
    for path in (workdir, *workdir.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    line = ended.error.strip()
    if ended.code != 1 or "\n" in line or os.strerror(error) not in line:
        return f"exit code {ended.code}: {line}", line
    if last(workdir) < saved:
        return f"step {saved} was saved and is gone", line
    return runs.ends_the_same(workdir), line


def second(runs: Runs, workdir: Path | str) -> tuple[str, str]:
    """Starts two runs in one work directory; what is wrong, and the second's error."""
    first = runs.start(workdir)
    while first.poll() is None and not last(workdir):
        time.sleep(0.02)
    ended = runs.finish(runs.start(workdir))
    line = ended.error.strip()
    code = runs.finish(first).code
    if ended.code != 1 or "is training in" not in line or "\n" in line:
        return f"the second: exit code {ended.code}: {line}", line
    return f"the first: exit code {code}" if code else runs.difference(workdir), line


def checks(
    runs: Runs, kills: int, damages: int, rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """For each check: what it is, what is wrong if anything, and where it was."""
    for i in range(kills):
        yield "kill -9", *kill(runs, runs.place(f"kill-{i}"), rng)
    for i in range(damages):
        yield "damage", *damage(runs, runs.place(f"damage-{i}"), rng)
    if isinstance(runs.whole, Path):
        yield "full disk", *full_disk(runs, runs.out / "full")
        yield "read-only", *read_only(runs, runs.out / "read_only")
    yield "two runs", *second(runs, runs.place("two"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the work directories here")
    parser.add_argument("--workdir", metavar="URL", help="have them below this URL")
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="navit-kills-") as temporary:
        out = args.out or Path(temporary)
        out.chmod(0o755) if not args.out else out.mkdir(parents=True)
        return report(Runs(out, args.workdir), args)


def report(runs: Runs, args: argparse.Namespace) -> int:
    print(f"{_STEPS} steps of {1e3 * runs.seconds_per_step:.0f} ms")
    passed: dict[str, list[bool]] = {}
    for name, wrong, where in checks(
        runs, args.kills, args.damages, random.Random(args.seed)
    ):
        passed.setdefault(name, []).append(not wrong)
        print(f"{name:10} {where}: {wrong or 'ends the same'}", flush=True)
    for name, each in passed.items():
        print(f"{name:10} {sum(each)} of {len(each)}")
    return 0 if all(map(all, passed.values())) else 1


def _losses(workdir: Path) -> list[Any]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    return [(x["step"], x["loss"]) for x in logged if "loss" in x]


def _progress(workdir: Path | str) -> int:
    """The last step that can be seen: in the log, or behind a URL a checkpoint."""
    if isinstance(workdir, str):
        return last(workdir)
    log = workdir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
