"""Karpathy's splits of COCO, Flickr30k and Flickr8k: `dataset_coco.json` and the like.

The file has `images`, each with `filename`, perhaps `filepath` (its folder), `split`,
and `sentences` whose `raw` is a caption.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator


def parted(table: str) -> tuple[str, tuple[str, ...]]:
    """`FILE.json#train+restval` -> the file, and the splits to read; none: all."""
    file, _, splits = table.rpartition("#")
    if not file.lower().endswith(".json"):
        return table, ()
    return file, tuple(splits.split("+"))


def rows(text: str, table: str, splits: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Each image of the splits, as a row of `file` and `caption` (a list).

    Args:
      text: the content of the file.
      splits: none: all.

    Raises:
      ValueError: for another kind of JSON, or a split that the file does not have.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{table}: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(
            f"{table} has no list of images: a .json table must be like Karpathy's "
            "dataset_coco.json; write others as .jsonl with file and caption"
        )
    read = [
        (f"{table} image {n}", *_image(x, f"{table} image {n}"))
        for n, x in enumerate(images, 1)
    ]
    counts = collections.Counter(split for _, split, _ in read)
    if unknown := [split for split in splits if split not in counts]:
        known = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise ValueError(
            f"{table} has no split {unknown[0]!r}: it has {known or 'no images'}"
        )
    for where, split, row in read:
        if not splits or split in splits:
            yield where, row


def _image(image: object, where: str) -> tuple[str, dict]:
    """The split of an image, and its row."""
    try:
        folder, name = image.get("filepath"), image["filename"]  # type: ignore
        captions = [sentence["raw"] for sentence in image["sentences"]]  # type: ignore
        split = image["split"]  # type: ignore
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is not like Karpathy's ({error!r}): it needs filename, split and "
            f"sentences with raw, not {image!r:.80}"
        ) from None
    return split, {"file": f"{folder}/{name}" if folder else name, "caption": captions}
