"""What a measurement must name: the device, its driver, the commit and the date."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import jax


def provenance() -> str:
    """One line for the head of a table."""
    kind = jax.devices()[0].device_kind
    driver = ""
    if jax.default_backend() == "gpu":
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        driver = f", driver {_output('nvidia-smi', *query)}"
    commit = _output(
        "git", "-C", str(Path(__file__).parent), "rev-parse", "--short=7", "HEAD"
    )
    date = datetime.date.today().isoformat()
    return f"{kind}{driver}, jax {jax.__version__}, commit {commit}, {date}"


def _output(*command: str) -> str:
    """The first line that a command prints; "unknown" without the command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()
