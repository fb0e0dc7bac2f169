"""Planned rows and images -> `PackedImages`: decode, resize, cut into place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from navit.batch import PackedImages
from navit.input import pixels
from navit.input.fill_views import fill_views
from navit.plan.rows import Rows
from navit.sources.images import standard
from navit.sources.source import Record

# Each kind of draw has its own number in the random key; `navit.plan` has others.
_WHICH_TOKENS = 3


# (record index, error) of each image that cannot be read: a ValueError for a bad record
# or image, an OSError for storage that fails.
Errors = list[tuple[int, ValueError | OSError]]


class Filled(NamedTuple):
    """Decoded rows.

    Attributes:
      images: an image that cannot be read leaves its slot empty.
      captions: those of each planned image, in order; none if its record is unreadable.
    """

    images: PackedImages
    captions: list[tuple[str, ...]]
    errors: Errors


def fill_rows(
    rows: Rows,
    read: Callable[[int], Record],
    *,
    patch_size: int,
    row_tokens: int,
    slots: int,
    image_size: int | None = None,
    resample: Literal["bilinear", "bicubic"] = "bilinear",
    dct: str = "fast",
    seed: int = 0,
) -> Filled:
    """Decodes each planned image straight into its place.

    Args:
      rows: the plan.
      read: record index -> its image and captions.
      seed: if an image keeps only some tokens, they are drawn from the seed, the epoch
        and the record.
      image_size: resize to this many pixels a side, and cut to the grid from the top
        left; None resizes to the grid.
      resample: the filter of the resize, for a plan with views.
    """
    captions: list[tuple[str, ...]] = [()] * len(rows.index)
    errors: Errors = []
    packed = PackedImages(
        patches=np.zeros((len(rows), row_tokens, patch_size**2 * 3), np.uint8),
        segment_ids=np.zeros((len(rows), row_tokens), np.int32),
        coords=np.zeros((len(rows), row_tokens, 2), np.int32),
        grids=np.zeros((len(rows), slots, 2), np.int32),
    )
    if rows.views is not None:
        captions, errors = fill_views(
            rows, read, packed, patch_size=patch_size, resample=resample, dct=dct
        )
        return Filled(packed, captions, errors)
    lengths = rows.lengths
    for row in range(len(rows)):
        start = 0
        for slot, i in enumerate(range(rows.offsets[row], rows.offsets[row + 1])):
            grid, index = rows.grids[i], int(rows.index[i])
            tokens = slice(start, start := start + int(lengths[i]))
            height, width = (grid * patch_size).tolist()
            box = None if rows.boxes is None else tuple(rows.boxes[i].tolist())
            try:
                size = (image_size, image_size) if image_size else (height, width)
                image, captions[i] = read(index)
                # Reads the file here: `pixels.load` turns an OSError into a ValueError.
                array = pixels.load(standard(image), *size, dct=dct, box=box)
                array = array[:height, :width]
            except (ValueError, OSError) as error:
                errors.append((index, error))
                continue
            if rows.flips is not None and rows.flips[i]:
                array = array[:, ::-1]
            coords = np.indices(grid).reshape(2, -1).T
            if lengths[i] == len(coords):
                pixels.to_patches(array, patch_size, packed.patches[row, tokens])
            else:
                rng = np.random.default_rng([seed, rows.epoch, _WHICH_TOKENS, index])
                kept = np.sort(rng.choice(len(coords), lengths[i], replace=False))
                patches = np.empty((len(coords), packed.patches.shape[-1]), np.uint8)
                pixels.to_patches(array, patch_size, patches)
                packed.patches[row, tokens], coords = patches[kept], coords[kept]
            packed.segment_ids[row, tokens] = slot + 1
            packed.coords[row, tokens] = coords
            packed.grids[row, slot] = grid
    return Filled(packed, captions, errors)


def slot_array(
    counts: np.ndarray, slots: int, values: np.ndarray, empty: int
) -> np.ndarray:
    """Values `[m, ...]`, in order, -> those of each row `[b, slots, ...]`.

    Args:
      counts: `[b]` how many of the values belong to each row.
    """
    out = np.full((len(counts), slots, *values.shape[1:]), empty, values.dtype)
    out[np.arange(slots) < counts[:, None]] = values
    return out
