"""Compares the memory that is needed with what is free, before allocating any."""

from __future__ import annotations

import os
from pathlib import Path


def check(needed: int, what: str, remedy: str) -> None:
    """Raises ValueError if `needed` bytes are more than is free."""
    free = free_memory()
    if needed > free:
        raise ValueError(
            f"{what} takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory "
            f"is free: {remedy}"
        )


def free_memory() -> int:
    """Bytes of available memory on Linux; elsewhere, of all memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024  # in kB there
