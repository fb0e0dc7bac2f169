"""Allows only one run at a time in a work directory."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from navit.train import hosts

log = logging.getLogger("navit")


def holder_name() -> str:
    """How a lock names this process."""
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since},"


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir`: the file `lock`, which names the run.

    The kernel releases it when the process ends, however it ends. In a run of several
    processes, process 0 holds it. Warns if the file system has no locks.

    Raises:
      PermissionError: if nothing can be written to `workdir`.
      ValueError: if another run holds it.
    """
    if not hosts.first():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
        raise PermissionError(
            f"{workdir} is read-only ({os.strerror(errno.EACCES)}): make it writable, "
            "or choose another --workdir"
        )
    path = workdir / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{holder} is training in {workdir} (it holds {path}): wait for it, "
                "stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            log.warning(
                "cannot lock %s (%s): make sure that no other run trains in %s",
                path,
                error.strerror,
                workdir,
            )
        file.truncate(0)
        file.write(f"{holder_name()}\n")
        file.flush()
        yield
