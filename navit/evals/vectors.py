"""Image vectors for evaluations, kept on disk so that nothing is embedded twice.

A folder holds the vectors of one model, data, budget and preprocessing, in parts of
`_PART` images, each a file of its own. A killed evaluation goes on at the part where it
was. An image that cannot be read is 0 and is tried again the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import navit
from navit import config as config_lib
from navit.config import Config
from navit.embed import Embedder
from navit.files import cache_home, write_atomic
from navit.input.fill import Errors
from navit.sources.source import Record, Source

log = logging.getLogger("navit")

_PART = 1024


class Vectors(NamedTuple):
    """Vectors of images.

    Attributes:
      pooled: float32 `[m, e]`, before normalisation; NaN for an unreadable image.
      errors: why images cannot be read; each process has those of its own images.
      per_second: images embedded in a second; None if all were kept.
      written: bytes written to the cache.
    """

    pooled: np.ndarray
    errors: Errors
    per_second: float | None
    written: int


def default_cache() -> Path:
    """Where vectors of released weights are kept."""
    return cache_home() / "embeddings"


def fingerprint(embedder: Embedder) -> str:
    """Changes with the weights, and with the config of the model."""
    checksum = hashlib.sha256(
        json.dumps(config_lib.to_json(embedder.config.model)).encode()
    )
    for leaf in jax.tree.leaves(embedder.model):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        checksum.update(np.ascontiguousarray(leaf).tobytes())
    return checksum.hexdigest()[:16]


def folder_of(
    embedder: Embedder, source: Source, max_tokens: int, *, weights: str, cache: Path
) -> Path:
    """The folder in `cache` for the vectors of a source at a budget.

    Args:
      weights: their fingerprint.
    """
    # On an accelerator, the same weights may run in bfloat16.
    dtype = np.dtype(embedder.vision.dtype).name
    data = (source.fingerprint(), source.version())
    key = (weights, data, max_tokens, settings(embedder.config), dtype)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return cache / f"{max_tokens}-{digest}"


def embed(
    embedder: Embedder,
    source: Source,
    count: int,
    max_tokens: int,
    *,
    folder: Path | None,
) -> Vectors:
    """Embeds the first `count` images of a source, or reads what is kept of them.

    All processes must call it; only the first reads and writes the folder.

    Args:
      folder: where to keep the vectors, from `folder_of`; None keeps none.

    Raises:
      FloatingPointError: if the model's vectors are not finite.
    """
    pooled = np.full((count, embedder.embed_dim), np.nan, np.float32)
    errors: Errors = []
    timed: list[tuple[int, float]] = []
    written, lost = 0, None
    for start in range(0, count, _PART):
        part = pooled[start : start + _PART]
        path = folder and folder / f"{start}-{start + len(part)}.npy"
        part[:] = _kept(path, part.shape)
        missing = start + np.flatnonzero(~part.any(-1))
        if not len(missing):
            continue

        def read(i: int, numbers: np.ndarray = missing) -> Record:
            return source.record(int(numbers[i]))

        began = time.perf_counter()
        strategy = embedder.config.data.strategy
        embedded = embedder.embed_source(
            read,
            source.sizes[missing],
            max_tokens if strategy is None else None,
            strategy=strategy,
            normalized=False,
            progress=_label(max_tokens, start, count),
        )
        timed.append((len(missing), time.perf_counter() - began))
        if not np.isfinite(embedded.vectors).all():
            raise FloatingPointError(
                f"{(~np.isfinite(embedded.vectors).all(-1)).sum()} of {len(missing)} "
                f"images have vectors at {max_tokens} tokens that are not finite: use "
                "an earlier checkpoint, or model.dtype=float32"
            )
        pooled[missing] = embedded.vectors
        errors += [(int(missing[i]), error) for i, error in embedded.errors]
        if path is not None and embedded.vectors.any() and jax.process_index() == 0:
            try:
                written += _keep(path, part)
            except OSError as error:
                lost = error
    if lost is not None:
        log.warning("not all vectors are kept in %s: %s", folder, lost)
    pooled[~pooled.any(-1)] = np.nan
    if len(timed) > 1:  # the first includes compilation
        del timed[0]
    images, seconds = np.sum(timed, 0) if timed else (0, 0)
    speed = round(float(images / seconds), 2) if timed else None
    return Vectors(pooled, errors, speed, written)


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
            "removed %.1f MB of vectors used longest ago from %s: eval.cache_gib=%g",
            (before - total) / 1e6,
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


def settings(config: Config) -> dict[str, object]:
    """The preprocessing on which vectors depend, besides the model and the budget."""
    names = ("max_upscale", "min_tokens", "dct")
    data: dict[str, object] = {name: getattr(config.data, name) for name in names}
    if config.data.square:  # without it, tables and vectors of earlier versions match
        data["square"] = True
    if config.data.strategy is not None:
        data["strategy"] = config_lib.to_json(config.data.strategy)
    return {**data, "navit": navit.__version__}


def _label(max_tokens: int, start: int, count: int) -> str | None:
    """What the progress bar says; None: no bar."""
    if jax.process_index():
        return None
    part = f", from image {start} of {count}" if count > _PART else ""
    return f"{max_tokens} tokens{part}"


def _kept(path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
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


def _keep(path: Path, vectors: np.ndarray) -> int:
    """Writes vectors `[m, e]`; returns their bytes."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return buffer.tell()
