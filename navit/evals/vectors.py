"""Image vectors for evaluations: embedded, or read where they are kept.

They are kept in parts of `_PART` images (`navit/evals/vector_cache.py`). A killed
evaluation goes on at the part where it was. An image that cannot be read is tried again
the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import navit
from navit import config as config_lib
from navit.config import Config
from navit.config.model import ROUNDING
from navit.embed import Embedded, Embedder
from navit.evals import vector_cache
from navit.evals.progress import Progress
from navit.input.fill import Errors
from navit.sources.source import Record, Source

log = logging.getLogger("navit")

_PART = 1024
# Fewer images than this are embedded in the time that compilation takes.
_TIMED = 100


class Vectors(NamedTuple):
    """Vectors of images.

    Attributes:
      pooled: float32 `[m, e]`, before normalisation; NaN for an unreadable image.
      errors: why images cannot be read; each process has those of its own images.
      per_second: images embedded in a second; None of fewer than 100.
      written: bytes written to the cache.
    """

    pooled: np.ndarray
    errors: Errors
    per_second: float | None
    written: int


def fingerprint(embedder: Embedder) -> str:
    """Changes with the weights, and with settings that change what they compute.

    It is the same for the same weights in another format, and for settings that change
    numbers only by rounding. It does not cover the tokenizer.
    """
    model = config_lib.to_json(embedder.config.model)
    for name in (*ROUNDING, "model.init_scale", "model.init_bias"):
        del model[name.removeprefix("model.")]
    if model["text"] is not None:
        del model["text"]["tokenizer"]
    checksum = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(embedder.model)
    for name, leaf in sorted((jax.tree_util.keystr(path), x) for path, x in leaves):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        checksum.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
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
    pooled = np.zeros((count, embedder.embed_dim), np.float32)
    parts = [_Part(x, min(x + _PART, count), folder) for x in range(0, count, _PART)]
    for part in parts:
        pooled[part.where] = vector_cache.read(part.path, pooled[part.where].shape)
    missing = int((~pooled.any(-1)).sum())
    log.info("%s", _to_do(count, missing, max_tokens))
    read = source.record
    if missing and not sys.stderr.isatty():  # where no bar is shown
        read = Progress(source.record, missing).read
    errors: Errors = []
    timed: list[tuple[int, float]] = []
    written, lost = 0, None
    try:
        for part in parts:
            own = part.start + np.flatnonzero(~pooled[part.where].any(-1))
            if not len(own):
                continue
            began = time.perf_counter()
            label = _label(max_tokens, part.start, count)
            embedded = _embed_some(embedder, read, source, own, max_tokens, label)
            timed.append((len(own), time.perf_counter() - began))
            pooled[own] = embedded.vectors
            errors += [(int(own[i]), error) for i, error in embedded.errors]
            if part.path and embedded.vectors.any() and jax.process_index() == 0:
                try:
                    written += vector_cache.write(part.path, pooled[part.where])
                except OSError as error:
                    lost = error
    except KeyboardInterrupt:
        if folder is not None and lost is None and jax.process_index() == 0:
            kept = int(pooled.any(-1).sum())
            log.info(
                "kept %d of %d images at %d tokens; the same command goes on there",
                kept,
                count,
                max_tokens,
            )
        raise
    if lost is not None:
        log.warning("not all vectors are kept in %s: %s", folder, lost)
    pooled[~pooled.any(-1)] = np.nan
    if len(timed) > 1:  # the first includes compilation
        del timed[0]
    images, seconds = np.sum(timed, 0) if timed else (0, 0)
    speed = round(float(images / seconds), 2) if images >= _TIMED else None
    return Vectors(pooled, errors, speed, written)


class _Part(NamedTuple):
    """Images that are kept in one file."""

    start: int
    stop: int
    folder: Path | None

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def path(self) -> Path | None:
        return self.folder and self.folder / f"{self.start}-{self.stop}.npy"


def _embed_some(
    embedder: Embedder,
    read: Callable[[int], Record],
    source: Source,
    own: np.ndarray,
    max_tokens: int,
    label: str | None,
) -> Embedded:
    """Embeds the images `own` `[m]` of a source, whose records `read` returns."""
    strategy = embedder.config.data.strategy
    embedded = embedder.embed_source(
        lambda i: read(int(own[i])),
        source.sizes[own],
        max_tokens if strategy is None else None,
        strategy=strategy,
        normalized=False,
        progress=label,
    )
    wrong = ~np.isfinite(embedded.vectors).all(-1)
    if wrong.any():
        raise FloatingPointError(
            f"{wrong.sum()} of {len(own)} images have vectors at {max_tokens} tokens "
            "that are not finite: use an earlier checkpoint, or model.dtype=float32"
        )
    return embedded


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


def _to_do(count: int, missing: int, max_tokens: int) -> str:
    """What is to be done: 2100 images at 640 tokens (1024 kept, 1076 to embed)."""
    kept = (
        f" ({count - missing} kept, {missing} to embed)" if missing else " (all kept)"
    )
    return (
        f"{count} image{'s' * (count != 1)} at {max_tokens} "
        f"token{'s' * (max_tokens != 1)}{kept if missing < count else ''}"
    )
