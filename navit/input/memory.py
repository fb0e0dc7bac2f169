"""Compares the memory that is needed with what is free, before allocating any."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# The memory limits of control groups, versions 2 and 1.
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def check(needed: int, what: str, remedy: str) -> None:
    """Raises ValueError if `needed` bytes are more than is free."""
    free = free_memory()
    if needed > free:
        raise ValueError(
            f"{what} takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory "
            f"is free: {remedy}"
        )


def free_memory() -> int:
    """Bytes of available memory on Linux, or the container's limit if that is lower.

    Elsewhere, bytes of all memory.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return free
    for line in lines:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024  # in kB there
    for limit in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free = min(free, int(Path(limit).read_text()))
    return free
