"""Keeps libtpu, JAX's TPU library, silent on machines without a TPU."""

from __future__ import annotations

import os
from pathlib import Path

# What libtpu reads when it loads: no metadata server, lock file, log files or warnings.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def quiet() -> None:
    """Sets the environment variables that keep libtpu silent, unless they are set.

    Call it before jax is imported.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def tpu_is_attached() -> bool:
    """Whether this machine has a device file of a TPU."""
    return any(any(Path("/dev").glob(x)) for x in ("accel[0-9]*", "vfio/[0-9]*"))
