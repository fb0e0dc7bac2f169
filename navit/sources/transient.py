"""Transient errors, of the network or the machine: what they are, and trying again."""

from __future__ import annotations

import errno
import math
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

# This process or machine has no more of something, which no file is to blame for.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TRANSIENT = (
    *_EXHAUSTED,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.EBUSY,
    errno.EAGAIN,
    errno.EIO,
)
# What HTTP, gcsfs and s3fs raise if a server cannot be reached, by module.
_DISCONNECTED = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "google.auth.exceptions": ("TransportError",),
    "botocore.exceptions": ("HTTPClientError", "ConnectionError"),
}

T = TypeVar("T")


class Retries:
    """Asks again after a transient error.

    Args:
      waits: seconds between tries; each wait is drawn from 0.5 to 1.5 times these.
      patience: after this many seconds without a success, nothing is tried again.
    """

    def __init__(self, *waits: float, patience: float = math.inf) -> None:
        self._waits, self._patience = waits, patience
        self._failing_since: float | None = None

    def __call__(self, ask: Callable[[], T]) -> T:
        """The answer; raises the error of the last try."""
        for wait in (*self._waits, None):
            try:
                answer = ask()
            except Exception as error:  # each file system has errors of its own
                if not is_transient(error):
                    raise
                now = time.monotonic()
                # Another thread may reset it meanwhile.
                since = self._failing_since or now
                self._failing_since = since
                if wait is None or now - since > self._patience:
                    raise
            else:
                self._failing_since = None
                return answer
            time.sleep(wait * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def is_transient(error: BaseException | None) -> bool:
    """Whether the same request may succeed later, judged by the error or its cause."""
    if error is None:
        return False
    if (status := _http_status(error)) is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    return _is_disconnected(error) or is_transient(error.__cause__)


def is_exhausted(error: BaseException | None) -> bool:
    """Whether files or memory have run out, judged by the error or its cause."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    return number in _EXHAUSTED or is_exhausted(error.__cause__)


def _http_status(error: BaseException) -> int | None:
    """The HTTP status of an error, under aiohttp's name or gcsfs's."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) else None


def _is_disconnected(error: BaseException) -> bool:
    """Whether a client could not reach its server; these are not always OSErrors."""
    for module, names in _DISCONNECTED.items():
        kinds = (getattr(sys.modules.get(module), name, ()) for name in names)
        if isinstance(error, tuple(kinds)):
            return True
    return False
