"""Tells transient errors, of the network or the machine, from those of a file."""

from __future__ import annotations

import errno
import functools

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


def is_transient(error: BaseException | None) -> bool:
    """Whether the same request may succeed later, judged by the error or its cause."""
    if error is None:
        return False
    if (status := http_status(error)) is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    transient = isinstance(error, TimeoutError | ConnectionError)
    return (
        transient
        or isinstance(error, _aiohttp_errors())
        or is_transient(error.__cause__)
    )


def is_exhausted(error: BaseException | None) -> bool:
    """Whether files or memory have run out, judged by the error or its cause."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    return number in _EXHAUSTED or is_exhausted(error.__cause__)


def http_status(error: BaseException) -> int | None:
    """The HTTP status of an error, under aiohttp's name or gcsfs's."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) else None


@functools.cache
def _aiohttp_errors() -> tuple[type[Exception], ...]:
    """What aiohttp raises for a broken connection; not always an OSError."""
    try:
        import aiohttp
    except ImportError:
        return ()
    return aiohttp.ClientConnectionError, aiohttp.ClientPayloadError
