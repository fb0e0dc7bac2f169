"""`navit compile`: from a config and the name of a slice to a printed report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from navit.compile import topology as topologies
from navit.config import Config
from navit.files import write_atomic

log = logging.getLogger("navit")

_TICK_SECONDS = 60


def run(
    config: Config,
    topology: str,
    *,
    evaluate: bool = False,
    quick: bool = False,
    out: Path | None = None,
) -> int:
    """Compiles, prints, and returns the exit code: 1 if something does not fit.

    Raises:
      ValueError: if the slice does not exist, the config does not fit it, or its
        compiler is not installed.
    """
    # A quick compile makes programs too slow to be worth timing. For a GPU there is no
    # schedule, so --quick makes no difference.
    gpu = topologies.is_gpu(topology)
    dump = None if quick or gpu else Path(tempfile.mkdtemp(prefix="navit-compile-"))
    try:
        topologies.prepare(
            None if dump is None else str(dump)
        )  # before anything below loads libtpu
        from navit.compile import printout, program

        devices = topologies.devices(topology, config.mesh.slices)
        if config.model.dtype == "auto":
            dtype = topologies.compute_dtype(topology)
            model = dataclasses.replace(config.model, dtype=dtype)
            config = dataclasses.replace(config, model=model)
        budgets = config.eval.budgets if evaluate else (None,)
        reports = []
        for budget in budgets:
            lowered = (
                program.train_program(config, devices)
                if budget is None
                else program.eval_program(config, devices, budget)
            )
            long = "minutes" if quick or gpu else "ten minutes or more (--quick: fewer)"
            log.info("compiling for %s; this takes %s", topology, long)
            with _ticking():
                report = printout.compile_program(lowered, topology, dump=dump)
            print(printout.table(report), flush=True)
            reports.append(printout.to_json(report))
        if out is not None:
            write_atomic(out, (json.dumps(reports, indent=2) + "\n").encode())
        return 0 if all(each["fits"] for each in reports) else 1
    finally:
        if dump is not None:
            shutil.rmtree(dump, ignore_errors=True)


@contextlib.contextmanager
def _ticking() -> Iterator[None]:
    """Logs now and then that the compilation is still running."""
    start, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(_TICK_SECONDS):
            log.info("still compiling, %.0f s", time.monotonic() - start)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
