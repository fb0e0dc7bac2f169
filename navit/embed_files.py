"""Embeds image files into an .npz, as `navit embed` does."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from navit.embed import Embedder
from navit.files import write_atomic
from navit.input.image_list import Named
from navit.plan.strategies import Strategy
from navit.sources.images import size_of
from navit.sources.source import Record

log = logging.getLogger("navit")


def embed_files(
    embedder: Embedder,
    images: Sequence[Named],
    out: Path,
    *,
    max_tokens: int | None = None,
    strategy: Strategy | None = None,
    skip_unreadable: bool = False,
) -> int:
    """Embeds images into an .npz with `names` and `embeddings`, in order.

    The images are read on demand, so there may be any number of them.

    Args:
      max_tokens, strategy: as in `Embedder.embed_images`.

    Returns:
      The number of embedded images.

    Raises:
      ValueError: names the first unreadable image, unless they are skipped.
    """
    readable, sizes = [], []

    def fail(name: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        if not skip_unreadable:
            raise ValueError(
                f"cannot read {name}: {reason} (--skip-unreadable leaves it out)"
            ) from error
        log.warning("left out, unreadable: %s (%s)", name, reason)

    headers = tqdm(images, "sizes", unit="image", delay=2, disable=None, leave=False)
    for image in headers:
        try:
            with image.open() as file:
                sizes.append(size_of(file))
            readable.append(image)
        except (ValueError, OSError) as error:
            fail(image.name, error)
    if not readable:
        raise ValueError(f"none of the {len(images)} images is readable")

    def read(index: int) -> Record:
        with readable[index].open() as file:
            return Record(file.read())

    vectors, errors = embedder.embed_source(
        read,
        np.array(sizes),
        max_tokens,
        strategy=strategy,
        stop=not skip_unreadable,
        progress="embedding",
    )
    for index, reason in errors:
        fail(readable[index].name, reason)
    failed = {index for index, _ in errors}
    embedded = [i for i in range(len(readable)) if i not in failed]
    buffer = io.BytesIO()
    names = np.array([readable[i].name for i in embedded])
    np.savez(buffer, names=names, embeddings=vectors[embedded])
    write_atomic(out, buffer.getvalue())
    return len(embedded)
