"""Embeds image files into an .npz, as `navit embed` does."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from navit.embed import Embedder
from navit.files import replacing, write_atomic
from navit.input.image_list import Named
from navit.plan.strategies import Strategy
from navit.sources.images import size_of
from navit.sources.source import Record

log = logging.getLogger("navit")

Fail = Callable[[str, Exception], None]


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
    fail = _left_out if skip_unreadable else _stop
    readable, sizes = _readable(images, fail)
    vectors, errors = embedder.embed_source(
        _read(readable),
        sizes,
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


def embed_tokens(
    embedder: Embedder,
    images: Sequence[Named],
    out: Path,
    *,
    max_tokens: int | None = None,
    strategy: Strategy | None = None,
    merged: bool = False,
    skip_unreadable: bool = False,
) -> int:
    """Writes the tokens of images into an .npz, a few batches at a time.

    It has `names`, and for the image `names[i]` an array of its own, float32
    `[rows, columns, d]`, called `i`; or `i/k` for each view k, if a strategy makes
    several. numpy reads an array of an .npz when it is asked for.

    Args:
      merged: what the tower's language model gets, as in `Embedder.features`.

    Returns, raises: as `embed_files`; and ValueError without a merger.
    """
    if merged:
        _ = embedder.merger  # raises before any image is read
    fail = _left_out if skip_unreadable else _stop
    readable, sizes = _readable(images, fail)
    found = embedder.features_source(
        _read(readable), sizes, max_tokens, strategy=strategy, merged=merged
    )
    names: list[str] = []
    progress = tqdm(
        found, "embedding", len(readable), unit="image", disable=None, leave=False
    )
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def write(key: str, array: np.ndarray) -> None:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        for image, own in zip(readable, progress, strict=True):
            if isinstance(own, ValueError | OSError):
                fail(image.name, own)
                continue
            if isinstance(own, np.ndarray):
                write(f"{len(names)}", own)
            else:
                for k, view in enumerate(own):
                    write(f"{len(names)}/{k}", view.tokens)
            names.append(image.name)
        write("names", np.array(names, str))
    return len(names)


def _readable(images: Sequence[Named], fail: Fail) -> tuple[list[Named], np.ndarray]:
    """The images whose headers can be read, and their sizes `[m, 2]`."""
    readable, sizes = [], []
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
    return readable, np.array(sizes)


def _read(images: Sequence[Named]) -> Callable[[int], Record]:
    def read(index: int) -> Record:
        with images[index].open() as file:
            return Record(file.read())

    return read


def _stop(name: str, error: Exception) -> None:
    raise ValueError(
        f"cannot read {name}: {_reason(error)} (--skip-unreadable leaves it out)"
    ) from error


def _left_out(name: str, error: Exception) -> None:
    log.warning("left out, unreadable: %s (%s)", name, _reason(error))


def _reason(error: Exception) -> object:
    return getattr(error, "strerror", None) or error
