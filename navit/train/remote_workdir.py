"""A work directory behind a URL: a copy on this machine, and what is sent where when.

Object stores neither append nor rename, so a run writes to a copy. Every checkpoint
sends what has changed: first the files of this process, then, by process 0, the log and
tables, and SHA256SUMS at the very end. A checkpoint without SHA256SUMS is not finished,
and the next run deletes it. Every process keeps a copy of its own, so the machines of a
run need share nothing but the URL.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from navit import config as config_lib
from navit.config import Config
from navit.sources.bucket import Bucket, check_writable, is_url
from navit.train import checksums, hosts, remote_lock
from navit.train.checks import check_unchanged
from navit.train.workdir import FOLDER, outdated

log = logging.getLogger("navit")

# What is not copied to the URL with the log and the tables.
_ASIDE = (FOLDER, "damaged", "embeddings", "lock", "budgets.lock")
# Each process lists what it has sent in this folder of a checkpoint.
_SENT = "sent"
_POLL_SECONDS = 0.5


class Remote:
    """What a URL and the copy of a run have of each other."""

    def __init__(self, bucket: Bucket, local: Path) -> None:
        self._bucket, self._local = bucket, local
        self._sent: dict[str, tuple[int, int]] = {}
        self.lock: remote_lock.Lock | None = None
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Ends the waiting for what other processes send, as one of them has failed."""
        self._given_up.set()

    def below(self, folder: str) -> Remote:
        """The same for a work directory in this one."""
        bucket = Bucket(f"{self._bucket.url}/{folder}")
        made = Remote(bucket, self._local / folder)
        made.lock = self.lock
        return made

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, in order."""
        paths = [name.split("/") for name in self._bucket.names(FOLDER)]
        marked = (x[1] for x in paths if len(x) == 3 and x[2] == checksums.NAME)
        return sorted(int(step) for step in marked if step.isdecimal())

    def config(self) -> Config | None:
        """The config of the run, if it has a finished checkpoint."""
        data = self._bucket.read("config.json") if self.steps() else None
        return None if data is None else config_lib.from_json(json.loads(data))

    def fetch(self) -> None:
        """Copies everything that a resumed run needs, and deletes unfinished writes.

        Of the checkpoints, those from the latest down to the first intact one.
        """
        self._fetch_files()
        saved = self.steps()
        if hosts.first():
            folders = {name.split("/")[1] for name in self._bucket.names(FOLDER)}
            for name in folders - {str(step) for step in saved}:
                self._bucket.remove(f"{FOLDER}/{name}")
        for step in reversed(saved):
            folder = f"{FOLDER}/{step}"
            self._bucket.fetch(self._bucket.names(folder), self._local)
            if not checksums.damage(self._local / folder):
                return

    def fetch_model(self) -> None:
        """Copies what an evaluation needs; of the latest checkpoint, the weights.

        Raises:
          FileNotFoundError: if there is no finished checkpoint.
        """
        saved = self.steps()
        if not saved:
            raise FileNotFoundError(
                f"{self._bucket.url} is not a navit work directory with a checkpoint"
            )
        folder = f"{FOLDER}/{saved[-1]}"
        names = self._bucket.names(folder)
        optimizer = f"{folder}/opt_state/"
        self._bucket.fetch(
            [x for x in names if not x.startswith(optimizer)], self._local
        )
        self._fetch_files()

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to damaged/, where no run looks for it."""
        if hosts.first():
            aside = f"damaged/{step}-{time.time_ns()}"
            self._bucket.move(f"{FOLDER}/{step}", aside)

    def publish(self, written: Path, step: int, keep: int, every: int | None) -> None:
        """Sends a checkpoint that each process has written its part of.

        All that several processes have written is sent by process 0. It waits for the
        others, so that SHA256SUMS comes last; then it deletes old checkpoints.
        """
        if self.lock is not None:
            self.lock.check()
        folder, process = f"{FOLDER}/{step}", jax.process_index()
        sums = checksums.of(written)
        if process:
            sums = _without(sums, self._awaited(f"{folder}/{_SENT}/0"))
        own = f"{folder}/{_SENT}/{process}"
        if not process:
            self._bucket.write(own, checksums.lines(sums))
        self._bucket.send(written, sums, folder)
        if process:
            self._bucket.write(own, checksums.lines(sums))
            return
        for other in range(1, jax.process_count()):
            sums |= self._awaited(f"{folder}/{_SENT}/{other}")
        self.send_files()
        self._bucket.remove(f"{folder}/{_SENT}")
        self._bucket.write(f"{folder}/{checksums.NAME}", checksums.lines(sums))
        for old in outdated(self.steps(), keep, every):
            self._bucket.remove(f"{FOLDER}/{old}/{checksums.NAME}")
            self._bucket.remove(f"{FOLDER}/{old}")

    def send_files(self) -> None:
        """Sends the log, the tables and whatever else has changed since the last time.

        Only process 0 does: it writes these.

        Raises:
          ValueError: if another run has taken the lock: its files would be replaced.
        """
        if not hosts.first():
            return
        if self.lock is not None:
            self.lock.check()
        changed = {}
        for path in self._local.rglob("*"):
            name = path.relative_to(self._local).as_posix()
            parts = name.split("/")
            # A file is written beside its place, in a folder whose name has a dot.
            hidden = any(part.startswith(".") for part in parts)
            if hidden or parts[0] in _ASIDE or FOLDER in parts or not path.is_file():
                continue
            status = path.stat()
            state = status.st_mtime_ns, status.st_size
            if self._sent.get(name) != state:
                changed[name] = state
        self._bucket.send(self._local, changed)
        self._sent |= changed

    def _fetch_files(self) -> None:
        names = [x for x in self._bucket.names() if x.split("/")[0] not in _ASIDE]
        names = [x for x in names if FOLDER not in x.split("/")]
        self._bucket.fetch(names, self._local)
        for name in names:
            status = (self._local / name).stat()
            self._sent[name] = status.st_mtime_ns, status.st_size

    def _awaited(self, name: str) -> dict[str, str]:
        """What a process says it has sent, once it is there."""
        while (data := self._bucket.read(name)) is None:
            if self._given_up.wait(_POLL_SECONDS):
                raise OSError(f"{name} is not there, as another process has failed")
        return checksums.parsed(data.decode())


@contextlib.contextmanager
def training(
    workdir: str | Path, config: Config | None = None
) -> Iterator[tuple[Path, Remote | None]]:
    """The folder to train in, and what sends it to the URL if `workdir` is one.

    Args:
      config: the config to train with, if it is known. It is compared with that of
        the run there before this waits for the lock of a run that was killed.

    Raises:
      ValueError: if another run trains there, the run there has another config, or
        nothing can be written there.
    """
    if not is_url(workdir):
        yield Path(workdir), None
        return
    check_writable(str(workdir))
    bucket = Bucket(str(workdir))
    with _copy(bucket) as remote, contextlib.ExitStack() as stack:
        if config is not None and (before := remote.config()) is not None:
            check_unchanged(before, config, workdir)
        if hosts.first():
            remote.lock = stack.enter_context(remote_lock.held(bucket))
        hosts.any_of(False)  # a barrier: a second run is refused before it deletes
        remote.fetch()
        hosts.any_of(False)  # a barrier: unfinished writes are deleted now
        try:
            yield remote._local, remote
        except BaseException:
            # The first error is the one to show.
            with contextlib.suppress(OSError, ValueError):
                remote.send_files()
            raise
        remote.send_files()


@contextlib.contextmanager
def reading(workdir: str | Path) -> Iterator[Path]:
    """The folder to read a model from; tables written there go to the URL."""
    if not is_url(workdir):
        yield Path(workdir).expanduser()
        return
    with _copy(Bucket(str(workdir))) as remote:
        remote.fetch_model()
        yield remote._local
        remote.send_files()


@contextlib.contextmanager
def _copy(bucket: Bucket) -> Iterator[Remote]:
    """An empty copy on this machine; messages have the URL in its place."""
    # A checkpoint that was given up may still be written there at the end.
    made = tempfile.TemporaryDirectory(prefix="navit-", ignore_cleanup_errors=True)
    with made as temporary:
        local = Path(temporary) / bucket.url.rpartition("/")[2]
        local.mkdir()

        def renamed(record: logging.LogRecord) -> bool:
            record.msg = record.getMessage().replace(str(local), bucket.url)
            record.args = ()
            return True

        log.addFilter(renamed)
        try:
            yield Remote(bucket, local)
        except (OSError, ValueError, FloatingPointError) as error:
            if str(local) not in str(error):
                raise
            kinds = (ValueError, FloatingPointError)
            kind = next((x for x in kinds if isinstance(error, x)), OSError)
            raise kind(str(error).replace(str(local), bucket.url)) from error
        finally:
            log.removeFilter(renamed)


def _without(sums: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in sums.items() if name not in others}
