"""Ctrl-C on the command line: exit code 130, whatever the process is doing."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130

# With `navit train --fail-on-sigterm`: what a shell reports of a process that SIGTERM
# ended (128 + 15).
PREEMPTED = 143

# How many seconds the main thread has to stop after the first Ctrl-C.
_GRACE = 5.0


def watch() -> None:
    """Makes Ctrl-C end this process even if Python does not react to it.

    The first Ctrl-C raises KeyboardInterrupt in the main thread. If the main thread is
    still running after 5 seconds, the process ends anyway: Python may be waiting for a
    compilation in C++, or the exception may have been raised where Python drops it, as
    in `__del__`. If another handler is installed (training saves first), it handles the
    first Ctrl-C. The second one ends the process at once.

    Does nothing outside the main thread, or if SIGINT is ignored (`nohup`).
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler waits for the main thread to return to Python; this byte does not.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def leave() -> NoReturn:
    """Ends the process with exit code 130, without the interpreter's shutdown.

    Threads of jax and grain may still be running, and would crash during a shutdown.
    The caller must have saved everything.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(EXIT_CODE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _ignore)  # `_listen` answers the second one
    raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _listen(reader: int) -> None:
    heard = 0
    while heard < 2:
        # With our own handler in place, there is nothing to save.
        ours = signal.getsignal(signal.SIGINT) in (_interrupt, _ignore)
        patience = _GRACE if heard and ours else None
        if not select.select([reader], [], [], patience)[0]:
            break
        numbers = os.read(reader, 64)
        heard += sum(number in (signal.SIGINT, signal.SIGTERM) for number in numbers)
    with contextlib.suppress(OSError):
        # Not `print`: the main thread may hold the lock of sys.stderr.
        os.write(2, b"navit: stopped\n")
    os._exit(EXIT_CODE)
