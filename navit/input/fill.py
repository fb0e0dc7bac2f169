"""Planned rows and images -> `PackedImages`: decode, resize, cut, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np

from navit.batch import PackedImages
from navit.input import geometry, pixels
from navit.input.plan import Rows, pack_rows

# What a random key is for, so that no two draws share one; `plan.py` has others.
_WHICH_TOKENS = 3


def fill_rows(
    rows: Rows,
    load: Callable[[int], pixels.ImageLike],
    *,
    patch_size: int,
    row_tokens: int,
    slots: int,
    image_size: int | None = None,
    dct: str = "fast",
    seed: int = 0,
    on_error: Callable[[int, ValueError], None],
) -> PackedImages:
    """Decodes each planned image straight into its place.

    Args:
      rows: the plan.
      load: record index -> image.
      seed: which tokens stay of an image that keeps some alone is drawn from it, the
        epoch and the record.
      image_size: resize to this many pixels a side, and cut to the grid from the top
        left; None resizes to the grid.
      on_error: called with (record index, error) for an image that cannot be decoded;
        unless it raises, the slot stays empty and the shapes stay the same.
    """
    packed = PackedImages(
        patches=np.zeros((len(rows), row_tokens, patch_size**2 * 3), np.uint8),
        segment_ids=np.zeros((len(rows), row_tokens), np.int32),
        coords=np.zeros((len(rows), row_tokens, 2), np.int32),
        grids=np.zeros((len(rows), slots, 2), np.int32),
    )
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
                array = pixels.load(load(index), *size, dct=dct, box=box)
                array = array[:height, :width]
            except (ValueError, OSError) as error:
                on_error(index, ValueError(str(error)))
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
    return packed


@overload
def pack(
    images: Sequence[pixels.ImageLike] | pixels.ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    max_upscale: float | None = ...,
    dct: str = ...,
    return_index: Literal[False] = ...,
) -> PackedImages: ...
@overload
def pack(
    images: Sequence[pixels.ImageLike] | pixels.ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    max_upscale: float | None = ...,
    dct: str = ...,
    return_index: Literal[True],
) -> tuple[PackedImages, np.ndarray]: ...
def pack(
    images: Sequence[pixels.ImageLike] | pixels.ArrayLike,
    *,
    patch_size: int = 16,
    max_tokens: int = 256,
    row_tokens: int = 1024,
    slots: int | None = None,
    max_upscale: float | None = None,
    dct: str = "fast",
    return_index: bool = False,
) -> PackedImages | tuple[PackedImages, np.ndarray]:
    """Packs images of any sizes into rows, each within its token budget.

    Args:
      images: as of `Embedder.embed_images`.
      patch_size: side of a patch in pixels.
      max_tokens: tokens that one image may take at most.
      row_tokens: length of a row.
      slots: images that one row may hold; None takes as many as the fullest row has.
      max_upscale: enlarge an image by this factor at most; None as the budget allows.
      dct: as in `navit.input.pixels.load`.
      return_index: also return `[b, s]` int: which image each slot holds, -1 if none.

    Raises:
      ValueError: names the image that cannot be decoded; or the budget and the row, if
        one image may be longer than a row.
    """
    if max_tokens > row_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is more than a row of row_tokens={row_tokens}"
        )
    if slots is not None and slots < 1:
        raise ValueError(f"slots must be at least 1, not {slots}")
    sizes = pixels.sizes_of(images)
    if not len(sizes):
        raise ValueError("there are no images to pack")
    grids = geometry.grids_for(
        sizes, max_tokens, patch_size=patch_size, max_upscale=max_upscale
    )
    rows = pack_rows(grids, row_tokens, slots)
    slots = slots or int(np.diff(rows.offsets).max())

    def fail(index: int, error: ValueError) -> None:
        raise ValueError(f"image {index} cannot be decoded: {error}") from error

    packed = fill_rows(
        rows,
        lambda i: images[i],
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        dct=dct,
        on_error=fail,
    )
    if not return_index:
        return packed
    return packed, slot_array(rows, slots, rows.index, -1)


def slot_array(
    rows: Rows, slots: int, values: np.ndarray, empty: int, *, group: int = 1
) -> np.ndarray:
    """Values per planned image `[m, ...]` -> per slot `[b, s, ...]`.

    Args:
      group: so many rows share their slots.
    """
    counts = np.diff(rows.offsets[::group])
    out = np.full((len(counts), slots, *values.shape[1:]), empty, values.dtype)
    out[np.arange(slots) < counts[:, None]] = values
    return out
