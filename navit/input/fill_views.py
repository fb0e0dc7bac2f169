"""Planned views and images -> `PackedImages`: decode once, resize, cut into place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from navit.batch import PackedImages
from navit.input import pixels
from navit.plan.rows import Rows
from navit.sources.images import standard
from navit.sources.source import Record


def fill_views(
    rows: Rows,
    read: Callable[[int], Record],
    packed: PackedImages,
    *,
    patch_size: int,
    resample: Literal["bilinear", "bicubic"],
    dct: str = "fast",
) -> tuple[list[tuple[str, ...]], list[tuple[int, ValueError | OSError]]]:
    """Decodes each image once and cuts its views into their places, in any rows.

    Args:
      rows: a plan with views.
      packed: empty rows, which are filled in place.
      resample: the filter of the resize.

    Returns:
      The captions of each planned view's image, and (index, error) of each image that
      cannot be read.
    """
    assert rows.views is not None
    captions: list[tuple[str, ...]] = [()] * len(rows.index)
    errors: list[tuple[int, ValueError | OSError]] = []
    places = _places(rows)
    views_of: dict[int, list[int]] = {}
    for i, index in enumerate(rows.index.tolist()):
        views_of.setdefault(index, []).append(i)
    for index, views in sorted(views_of.items()):
        try:
            record = read(index)
            # Reads the file here: `pixels` turns an OSError into a ValueError.
            image, parts = standard(record.image), _parts(rows.views[views])
            arrays = pixels.load_parts(image, parts, dct=dct, resample=resample)
        except (ValueError, OSError) as error:
            errors.append((index, error))
            continue
        by_part = dict(zip(parts, arrays, strict=True))
        for i in views:
            captions[i] = record.captions
            row, slot, start = places[i]
            tokens = slice(start, start + int(rows.grids[i].prod()))
            view = rows.views[i]
            shown = _shown(by_part[_part(view)], view, rows.grids[i] * patch_size)
            pixels.to_patches(shown, patch_size, packed.patches[row, tokens])
            packed.segment_ids[row, tokens] = slot + 1
            packed.coords[row, tokens] = np.indices(rows.grids[i]).reshape(2, -1).T
            packed.grids[row, slot] = rows.grids[i]
    return captions, errors


Part = tuple[tuple[int, ...], tuple[int, ...]]


def _part(view: np.void) -> Part:
    return tuple(view["box"].tolist()), tuple(view["size"].tolist())


def _parts(views: np.ndarray) -> list[Part]:
    """The distinct boxes with the sizes that they are resized to."""
    return list(dict.fromkeys(map(_part, views)))


def _places(rows: Rows) -> list[tuple[int, int, int]]:
    """(row, slot, first token) of each planned view."""
    places = []
    for row in range(len(rows)):
        start = 0
        for slot, i in enumerate(range(rows.offsets[row], rows.offsets[row + 1])):
            places.append((row, slot, start))
            start += int(rows.grids[i].prod())
    return places


def _shown(resized: np.ndarray, view: np.void, size: np.ndarray) -> np.ndarray:
    """The window of a resized image, filled beyond it, cut to whole patches.

    Args:
      resized: `[h, w, 3]` uint8.
      size: (height, width) of the view's whole patches.
    """
    top, left = view["window"][:2].tolist()
    high, wide = size.tolist()
    inside = resized[max(0, top) : top + high, max(0, left) : left + wide]
    if inside.shape[:2] == (high, wide):
        return inside
    shown = np.full((high, wide, 3), view["fill"], np.uint8)
    down, right = max(0, -top), max(0, -left)
    shown[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return shown
