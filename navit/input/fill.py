"""Planned rows and images -> `PackedImages`: decode, resize, cut into place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from navit.batch import PackedImages, PackedTokens
from navit.input import memory, pixels
from navit.plan import geometry
from navit.plan.epoch import Rows, pack_rows
from navit.sources.images import ArrayLike, ImageLike, image_name, sizes_of, standard
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
    """
    captions: list[tuple[str, ...]] = [()] * len(rows.index)
    errors: Errors = []
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


@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    rows: None = ...,
    max_upscale: float | None = ...,
    dct: str = ...,
    return_index: Literal[False] = ...,
) -> PackedImages: ...
@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    rows: None = ...,
    max_upscale: float | None = ...,
    dct: str = ...,
    return_index: Literal[True],
) -> tuple[PackedImages, np.ndarray]: ...
@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int = ...,
    row_tokens: int = ...,
    slots: int,
    rows: int,
    max_upscale: float | None = ...,
    dct: str = ...,
    return_index: bool = ...,
) -> tuple[PackedImages, np.ndarray, np.ndarray]: ...
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = 16,
    max_tokens: int = 256,
    row_tokens: int = 1024,
    slots: int | None = None,
    rows: int | None = None,
    max_upscale: float | None = None,
    dct: str = "fast",
    return_index: bool = False,
) -> (
    PackedImages
    | tuple[PackedImages, np.ndarray]
    | tuple[PackedImages, np.ndarray, np.ndarray]
):
    """Packs images of any sizes into rows, each within its token budget.

    Without `rows`, makes as many rows as all the images need. With `rows` and `slots`
    the shapes are fixed: images are taken in order, and an image that fits in no row is
    left out. Pass those again, before new ones, with the next call.

    Args:
      images: as in `Embedder.embed_images`.
      patch_size: side of a patch in pixels.
      max_tokens: the most tokens that one image may take.
      row_tokens: length of a row.
      slots: the most images in a row; None takes as many as the fullest row has.
      rows: how many rows to make, empty ones included; needs `slots`.
      max_upscale: enlarge an image by at most this factor; None: as the budget allows.
      dct: as in `navit.input.pixels.load`.
      return_index: also return the index.

    Returns:
      The packed images; with `return_index` or `rows` also the index, `[b, s]` int:
      which image each slot holds, -1 if none; with `rows` also the images left out,
      `[k]` int, in order.

    Raises:
      TypeError: if `images` is not a list, or a count not a whole number.
      ValueError: names the image that cannot be decoded; or the budget and the row, if
        one image may be longer than a row; or the memory, if there is too little.
    """
    geometry.check_count("patch_size", patch_size)
    geometry.check_count("max_tokens", max_tokens)
    geometry.check_count("row_tokens", row_tokens)
    for name, value in (("slots", slots), ("rows", rows)):
        if value is not None:
            geometry.check_count(name, value)
    if max_tokens > row_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is more than a row of row_tokens={row_tokens}"
        )
    sizes = sizes_of(images)
    grids = geometry.grids_for(
        sizes, max_tokens, patch_size=patch_size, max_upscale=max_upscale
    )
    if rows is None:
        if not len(sizes):
            raise ValueError("there are no images to pack")
        fewest = -(-int(grids.prod(-1).sum()) // row_tokens)
        _check_memory(fewest, row_tokens, patch_size)  # a plan of long rows takes some
        planned = pack_rows(grids, row_tokens, slots)
        _check_memory(len(planned), row_tokens, patch_size)
        slots = slots or int(np.diff(planned.offsets).max())
    elif slots is None:
        raise ValueError(f"rows={rows} is for a fixed shape: give slots a number too")
    else:
        _check_memory(rows, row_tokens, patch_size)
        planned = _rows_of(grids, rows, row_tokens, slots)
    packed, _, errors = fill_rows(
        planned,
        lambda i: Record(images[i]),
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        dct=dct,
    )
    for image, error in errors:
        raise ValueError(
            f"{image_name(images, image)} cannot be decoded: {error}"
        ) from error
    index = slot_array(planned, slots, planned.index, -1)
    if rows is not None:
        return packed, index, np.setdiff1d(np.arange(len(sizes)), planned.index)
    return (packed, index) if return_index else packed


def _check_memory(rows: int, row_tokens: int, patch_size: int) -> None:
    memory.check(
        rows * row_tokens * patch_size**2 * 3,
        f"packing into {rows} x {row_tokens} tokens (rows x row_tokens)",
        "lower row_tokens or rows, or pack fewer images at a time",
    )


def _rows_of(grids: np.ndarray, rows: int, row_tokens: int, slots: int) -> Rows:
    """Packs images with grids `[m, 2]` in order into `rows` rows, by best fit.

    Leaves out the images that do not fit.
    """
    room = np.full(rows, row_tokens)
    held: list[list[int]] = [[] for _ in range(rows)]
    for image, tokens in enumerate(grids.prod(-1).tolist()):
        after = room - tokens
        best = int(np.where(after < 0, row_tokens, after).argmin())
        if after[best] >= 0:
            held[best].append(image)
            # A row of full slots has no room for any image.
            room[best] = after[best] if len(held[best]) < slots else 0
    index = np.array([image for row in held for image in row], np.int64)
    return Rows(np.cumsum([0, *map(len, held)]), index, grids[index])


def unpack(
    tokens: Any,
    packed: PackedImages | PackedTokens | None = None,
    index: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Each image's tokens as an array `[rows, columns, d]`: the way back from `pack`.

    `pack` reorders the images. With its `index`, the arrays come in the images' order;
    without, they come row by row and slot by slot.

    Args:
      tokens: `PackedTokens`, such as `model.vision(packed).packed`; or `[b, n, d]` of
        numpy or jax.
      packed: where the tokens lie; None: as `PackedTokens` has it.
      index: `[b, s]`, from `pack(..., return_index=True)`.

    Raises:
      TypeError: if `tokens` has no layout and `packed` is not given.
      ValueError: if the shapes do not agree, or an image lacks tokens of its grid.
    """
    if isinstance(tokens, PackedTokens):
        packed, tokens = tokens if packed is None else packed, tokens.tokens
    if packed is None:
        raise TypeError(
            f"tokens is a {type(tokens).__name__} without the layout of its images: "
            "pass out.packed of out = model.vision(packed), or packed as well"
        )
    tokens = np.asarray(tokens)
    segment_ids, coords, grids = (np.asarray(x) for x in packed[1:])
    b, n = segment_ids.shape
    if tokens.ndim != 3 or tokens.shape[:2] != (b, n):
        raise ValueError(f"tokens must be [{b}, {n}, d], not {tokens.shape}")
    filled = np.argwhere(grids.prod(-1))
    if index is not None:
        if index.shape != grids.shape[:2]:
            raise ValueError(f"index must be {grids.shape[:2]}, not {index.shape}")
        filled = filled[index[tuple(filled.T)].argsort()]
    images = []
    for row, slot in filled:
        mine = segment_ids[row] == slot + 1
        rows, columns = grids[row, slot]
        place = coords[row, mine] @ (columns, 1)
        if not np.array_equal(np.sort(place), np.arange(rows * columns)):
            raise ValueError(
                f"the image in row {row} slot {slot} has {len(place)} tokens, not each "
                f"one of its {rows}x{columns} grid once: unpack only images without "
                "dropped tokens"
            )
        image = tokens[row, mine][place.argsort()]
        images.append(image.reshape(rows, columns, -1))
    return images


def slot_array(
    rows: Rows, slots: int, values: np.ndarray, empty: int, *, group: int = 1
) -> np.ndarray:
    """Values per planned image `[m, ...]` -> per slot `[b, s, ...]`.

    Args:
      group: the number of rows that share their slots.
    """
    counts = np.diff(rows.offsets[::group])
    out = np.full((len(counts), slots, *values.shape[1:]), empty, values.dtype)
    out[np.arange(slots) < counts[:, None]] = values
    return out
