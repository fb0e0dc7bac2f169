"""The folders in which image vectors are kept, so that nothing is embedded twice.

A folder holds the vectors of one model, data, budget and preprocessing, in parts, each
a file of its own. An image that cannot be read is 0.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from navit.files import cache_home, write_atomic

log = logging.getLogger("navit")


def default_cache() -> Path:
    """Where vectors of released weights are kept."""
    return cache_home() / "embeddings"


def evict(cache: Path, used: Collection[Path], gib: float | None) -> None:
    """Removes the folders used longest ago, until the rest takes at most `gib` GiB.

    Those in `used` stay, and are marked as used now. A removal that is interrupted
    leaves whole parts, which are still valid. Only the first process calls it.

    Args:
      gib: None removes nothing.
    """
    for folder in used:
        with contextlib.suppress(OSError):
            os.utime(folder)
    if gib is None:
        return
    sizes = {x: _bytes(x) for x in cache.glob("*-" + 24 * "[0-9a-f]")}
    before = total = sum(sizes.values())
    for folder in sorted({*sizes} - {*used}, key=_last_used):
        if total > gib * 2**30:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]
    if total < before:
        log.info(
            "removed %s of vectors used longest ago from %s: eval.cache_gib=%g",
            size_text(before - total),
            cache,
            gib,
        )
    if total > gib * 2**30:
        log.info(
            "this evaluation keeps %.2f GiB of vectors in %s, more than "
            "eval.cache_gib=%g",
            total / 2**30,
            cache,
            gib,
        )


def size_text(count: int) -> str:
    """Bytes for a message: 12 kB, 3.4 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _bytes(path: Path) -> int:
    """The size of a file, or of a folder's files; 0 if another process removed it."""
    try:
        return (
            sum(map(_bytes, path.iterdir())) if path.is_dir() else path.stat().st_size
        )
    except OSError:
        return 0


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def read(path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
    """The vectors in a file of this shape; 0 if there are none."""
    vectors = np.zeros(shape, np.float32)
    if path is not None and jax.process_index() == 0 and path.is_file():
        try:
            vectors[:] = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            log.warning(
                "%s is damaged (%s): its images are embedded again", path, error
            )
            vectors[:] = 0
    if path is None or jax.process_count() == 1:
        return vectors
    return np.array(multihost_utils.broadcast_one_to_all(vectors))


def write(path: Path, vectors: np.ndarray) -> int:
    """Writes vectors `[m, e]`; returns their bytes."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return buffer.tell()
