"""Several processes that train one model: how they join, and what they agree on.

Every process runs the same program on its own rows. All functions here but `first` and
`is_lost` are collective: every process calls them at the same point.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from navit import config as config_lib
from navit.config import Config
from navit.libtpu import tpu_is_attached

log = logging.getLogger("navit")

# Counts of processes that launchers set: Slurm (this step), Open MPI, TPU slices.
_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")

# Jax ends all processes when process 0 ends. So after an error, process 0 waits for
# these seconds, in which others can print the same error.
_LAST = 5


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    debug: bool = False,
) -> Iterator[None]:
    """Joins the processes of a run; does nothing if there is only one.

    Without arguments, jax finds them on a Cloud TPU slice, in GKE, under Slurm or Open
    MPI. An error in one process ends it at once, and with it the others, which would
    wait for it forever.

    Args:
      coordinator: HOST:PORT on which process 0 listens; the port must be free.
      processes: how many there are; 1 means that there are no others to find.
      process: the index of this one.
      debug: show the traceback of any error.

    Raises:
      ValueError: if only some of the three are given.
      ConnectionError: if the other processes cannot be found or reached.
    """
    given = (coordinator, processes, process)
    if processes == 1 or (given == (None,) * 3 and not _started_as_one_of_several()):
        yield
        return
    if None in given and given != (None,) * 3:
        raise ValueError(
            f"--coordinator {coordinator}, --processes {processes} and --process "
            f"{process} go together: give all three, or none on a Cloud TPU slice, in "
            "GKE, under Slurm or Open MPI"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConnectionError(
            f"cannot join the other processes: {error} (name them with "
            "--coordinator HOST:PORT --processes N --process I, or pass --processes 1 "
            "to run alone)"
        ) from error
    began = time.monotonic()
    try:
        if not first():
            log.setLevel(logging.WARNING)  # only process 0 reports progress
        log.info(
            "%d processes with %d devices each",
            jax.process_count(),
            jax.local_device_count(),
        )
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        # A clean exit would wait for the others, which wait for this one.
        expected = (ValueError, OSError, FloatingPointError, KeyboardInterrupt)
        lost = is_lost(error)
        if debug or not (lost or isinstance(error, expected)):
            traceback.print_exc()
        name = f"{type(error).__name__}: {error}" if str(error) else repr(error)
        if lost:
            name = (
                f"lost another process after {time.monotonic() - began:.0f} s: what it "
                "printed, or its host's log, says why; the same command resumes the "
                f"run ({str(error).partition(chr(10))[0]})"
            )
        print(f"navit: process {jax.process_index()}: {name}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if first():
            time.sleep(_LAST)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    jax.distributed.shutdown()


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection to another process broke, as Gloo reports it on CPUs."""
    kinds = (ValueError, jax.errors.JaxRuntimeError)
    return isinstance(error, kinds) and "Gloo" in str(error)


def _started_as_one_of_several(env: Mapping[str, str] = os.environ) -> bool:
    if "JAX_COORDINATOR_ADDRESS" in env or any(int(env.get(k, 1)) > 1 for k in _SIZES):
        return True
    if "TPU_WORKER_HOSTNAMES" in env:
        return "," in env["TPU_WORKER_HOSTNAMES"]
    # Only its metadata shows whether a TPU virtual machine is one of several, and jax
    # reads it. A single machine joins itself, at no cost.
    return (
        env.get("JAX_PLATFORMS", "tpu") == "tpu"
        and "TPU_SKIP_MDS_QUERY" not in env
        and importlib.util.find_spec("libtpu") is not None
        and tpu_is_attached()
    )


def first() -> bool:
    """Whether this is process 0, which writes whatever is written only once."""
    return jax.process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """Stacks the `values` of all processes: `[...]` -> `[processes, ...]`."""
    if jax.process_count() == 1:
        return values[None]
    # Sent as bytes, since jax without 64-bit types would round.
    raw = np.ascontiguousarray(values)
    gathered = multihost_utils.process_allgather(raw.view(np.uint8))
    return np.asarray(gathered).view(values.dtype)


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process. Also serves as a barrier."""
    return bool(gather(np.array([flag])).any())


def gather_texts(value: str) -> list[str]:
    """The `value` of every process, in order."""
    own = np.frombuffer(value.encode(), np.uint8)
    lengths = gather(np.array([own.size]))[:, 0].tolist()
    padded = np.zeros(max(lengths), np.uint8)
    padded[: own.size] = own
    rows = zip(gather(padded), lengths, strict=True)
    return [row[:length].tobytes().decode() for row, length in rows]


def check_same(what: str, value: str) -> None:
    """Raises ValueError in every process unless `value` is the same in all."""
    first, *others = gather_texts(value)
    for process, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"{what} is {other} in process {process} and {first} in process 0: run "
                "the same command with the same files on every host"
            )


def check_same_config(config: Config) -> None:
    """Raises ValueError in every process, naming the keys, if configs differ."""
    texts = gather_texts(json.dumps(config_lib.to_json(config)))
    first, *others = (config_lib.from_json(json.loads(text)) for text in texts)
    for process, other in enumerate(others, 1):
        if differences := config_lib.differences(first, other):
            raise ValueError(
                f"process 0 and process {process} have different configs "
                f"({'; '.join(differences[:3])}): run the same command with the same "
                "files on every host"
            )
