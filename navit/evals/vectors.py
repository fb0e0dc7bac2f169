"""Image vectors for evaluations, kept on disk so that nothing is embedded twice.

A folder holds the vectors of one model, data, budget and preprocessing, in parts of
`_PART` images, each a file of its own. A killed evaluation goes on at the part where it
was. An image that cannot be read is 0 and is tried again the next time.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
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


def embed(
    embedder: Embedder,
    source: Source,
    count: int,
    max_tokens: int,
    *,
    weights: str,
    cache: Path | None,
) -> Vectors:
    """Embeds the first `count` images of a source, or reads what is kept of them.

    All processes must call it; only the first reads and writes the cache.

    Args:
      weights: their fingerprint.
      cache: the folder to keep vectors in; None keeps none.
    """
    folder = None
    if cache is not None:
        # On an accelerator, the same weights may run in bfloat16.
        dtype = np.dtype(embedder.vision.dtype).name
        how = settings(embedder.config)
        data = (source.fingerprint(), source.version())
        key = (weights, data, max_tokens, how, dtype)
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        folder = cache / f"{max_tokens}-{digest}"
    pooled = np.full((count, embedder.embed_dim), np.nan, np.float32)
    errors: Errors = []
    timed: list[tuple[int, float]] = []
    written = 0
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
        embedded = embedder.embed_source(
            read,
            source.sizes[missing],
            max_tokens,
            normalized=False,
            progress=_label(max_tokens, start, count),
        )
        timed.append((len(missing), time.perf_counter() - began))
        pooled[missing] = embedded.vectors
        errors += [(int(missing[i]), error) for i, error in embedded.errors]
        if path is not None and embedded.vectors.any() and jax.process_index() == 0:
            written += _keep(path, part)
    pooled[~pooled.any(-1)] = np.nan
    if len(timed) > 1:  # the first includes compilation
        del timed[0]
    images, seconds = np.sum(timed, 0) if timed else (0, 0)
    speed = round(float(images / seconds), 2) if timed else None
    return Vectors(pooled, errors, speed, written)


def settings(config: Config) -> dict[str, object]:
    """The preprocessing on which vectors depend, besides the model and the budget."""
    names = ("max_upscale", "min_tokens", "dct")
    data = {name: getattr(config.data, name) for name in names}
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
    """Writes vectors `[m, e]`; returns their bytes, 0 if the disk takes none."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        log.warning("vectors are not kept: %s", error)
        return 0
    return buffer.tell()
