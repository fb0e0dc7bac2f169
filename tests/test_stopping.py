"""navit.stopping: Ctrl-C ends a process with 130 where Python does not hear it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Minutes in C, which a handler has to wait for; or an exception that is dropped.
BUSY = {
    "in C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "dropped": "with contextlib.suppress(KeyboardInterrupt): time.sleep(100)\n"
    "time.sleep(100)",
}


def interrupted(code: str, signals: int) -> tuple[int, float, str]:
    """Exit status, seconds from the first signal to the end, and stderr."""
    code = f"import contextlib, hashlib, time\nfrom navit import stopping\n{code}"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        began = time.monotonic()
        for _ in range(signals):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.2)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, time.monotonic() - began, stderr


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("signals, grace", [(1, 1.0), (2, 60.0)])
def test_ctrl_c_ends_a_process_that_does_not_hear_it(busy, signals, grace):
    code = f"stopping._GRACE = {grace}\nstopping.watch()\nprint(0, flush=True)\n"
    status, seconds, stderr = interrupted(code + BUSY[busy], signals)
    assert (status, stderr) == (130, "navit: stopped\n")
    assert seconds < 30 and (signals == 2 or seconds > 0.9)


def test_a_handler_that_saves_has_the_time_it_needs():
    code = (
        "import signal\n"
        "stopping._GRACE = 0.1\n"
        "stopping.watch()\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "print(0, flush=True)\n"
        "time.sleep(1.5)\n"
        "stopping.leave()\n"
    )
    status, seconds, stderr = interrupted(code, 1)
    assert (status, stderr) == (130, "") and seconds > 1
