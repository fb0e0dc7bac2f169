"""Allows only one run at a time behind a URL, where the kernel has no locks.

The file `lock` names the run that holds it, which writes it again every few seconds. A
run that finds a lock watches it: if it changes, its holder lives and the second run is
refused; if it does not, its holder was killed and the second run takes the lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator

from navit.sources.bucket import Bucket
from navit.train import lock

log = logging.getLogger("navit")

_NAME = "lock"
# The holder writes the lock every so many seconds, and loses it after four times that.
_BEAT_SECONDS = 10.0


class Lock:
    """A lock that is held: it is written again until `release`."""

    def __init__(self, bucket: Bucket) -> None:
        self.holder = lock.holder_name()
        self._bucket, self._id, self._beats = bucket, uuid.uuid4().hex, 0
        self._released, self._lost_to = threading.Event(), ""
        self._write()
        time.sleep(_BEAT_SECONDS / 10)  # another may write it at the same moment
        self._look()
        self.check()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ValueError if another run has taken the lock."""
        if self._lost_to:
            raise ValueError(
                f"{self._lost_to} is training in {self._bucket.url}: wait for it, stop "
                "it, or choose another --workdir"
            )

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self._lost_to:
            with contextlib.suppress(OSError):  # the next run finds it dead
                self._bucket.remove(_NAME)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS) and not self._lost_to:
            try:
                self._look()
                if not self._lost_to:
                    self._write()
            except OSError as error:
                log.warning("cannot write the lock of %s (%s)", self._bucket.url, error)

    def _look(self) -> None:
        stored = _parsed(self._bucket.read(_NAME))
        if stored.get("id", self._id) != self._id:
            self._lost_to = stored.get("holder", "another process")

    def _write(self) -> None:
        self._beats += 1
        stored = {"holder": self.holder, "id": self._id, "beat": self._beats}
        self._bucket.write(_NAME, json.dumps(stored).encode())


@contextlib.contextmanager
def held(bucket: Bucket) -> Iterator[Lock]:
    """Holds the lock of a URL.

    Raises:
      ValueError: if another run holds it.
    """
    before = now = bucket.read(_NAME)
    if before is not None:
        holder = _parsed(before).get("holder", "another process")
        log.info("%s has a lock on %s: looking if it lives", holder, bucket.url)
        until = time.monotonic() + 4 * _BEAT_SECONDS
        while now == before and time.monotonic() < until:
            time.sleep(_BEAT_SECONDS / 10)
            now = bucket.read(_NAME)
        if now is not None and now != before:
            raise ValueError(
                f"{holder} is training in {bucket.url} (it writes {_NAME} there): wait "
                "for it, stop it, or choose another --workdir"
            )
    own = Lock(bucket)
    try:
        yield own
    finally:
        own.release()


def _parsed(data: bytes | None) -> dict[str, str]:
    try:
        return json.loads(data or b"{}")
    except ValueError:
        return {}
