"""Images of any sizes -> `PackedImages`, and each image's tokens back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np

from navit.batch import PackedImages, PackedTokens
from navit.input import memory
from navit.input.fill import fill_rows, slot_array
from navit.plan import geometry
from navit.plan.epoch import Rows, pack_rows
from navit.plan.strategies import Strategy
from navit.plan.view_rows import Views, views_of
from navit.sources.images import ArrayLike, ImageLike, image_name, sizes_of
from navit.sources.source import Record


@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int | None = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    rows: None = ...,
    max_upscale: float | None = ...,
    strategy: Strategy | None = ...,
    dct: str = ...,
    return_index: Literal[False] = ...,
) -> PackedImages: ...
@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int | None = ...,
    row_tokens: int = ...,
    slots: int | None = ...,
    rows: None = ...,
    max_upscale: float | None = ...,
    strategy: Strategy | None = ...,
    dct: str = ...,
    return_index: Literal[True],
) -> tuple[PackedImages, np.ndarray]: ...
@overload
def pack(
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = ...,
    max_tokens: int | None = ...,
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
    max_tokens: int | None = None,
    row_tokens: int = 1024,
    slots: int | None = None,
    rows: int | None = None,
    max_upscale: float | None = None,
    strategy: Strategy | None = None,
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
      max_tokens: the most tokens that one image may take; None is 256.
      row_tokens: length of a row.
      slots: the most images in a row; None takes as many as the fullest row has.
      rows: how many rows to make, empty ones included; needs `slots`.
      max_upscale: enlarge an image by at most this factor; None: as the budget allows.
      strategy: pack each image's views by this rule (`navit.strategies`), in place of
        `max_tokens` and `max_upscale`. A slot then holds a view. The views of one image
        may lie in several rows.
      dct: as in `navit.input.pixels.load`.
      return_index: also return the index.

    Returns:
      The packed images; with `return_index` or `rows` also the index, `[b, s]` int:
      which image each slot holds, -1 if none; with a strategy `[b, s, 2]`, which image
      and which of its views. With `rows` also the images left out, `[k]` int, in order.

    Raises:
      TypeError: if `images` is not a list, or a count not a whole number.
      ValueError: names the image that cannot be decoded; or the budget and the row, if
        one image may be longer than a row; or the memory, if there is too little.
    """
    if strategy is not None:
        for name, value in (
            ("max_tokens", max_tokens),
            ("max_upscale", max_upscale),
            ("rows", rows),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}={value} has no effect with a strategy: leave one of them "
                    "out"
                )
        return _pack_views(
            images,
            strategy,
            patch_size=patch_size,
            row_tokens=row_tokens,
            slots=slots,
            dct=dct,
            return_index=return_index,
        )
    max_tokens = 256 if max_tokens is None else max_tokens
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


def _pack_views(
    images: Sequence[ImageLike] | ArrayLike,
    strategy: Strategy,
    *,
    patch_size: int,
    row_tokens: int,
    slots: int | None,
    dct: str,
    return_index: bool,
) -> PackedImages | tuple[PackedImages, np.ndarray]:
    geometry.check_count("row_tokens", row_tokens)
    if slots is not None:
        geometry.check_count("slots", slots)
    sizes = sizes_of(images)
    if not len(sizes):
        raise ValueError("there are no images to pack")

    def name(i: int) -> str:
        return image_name(images, i)

    views = views_of(strategy, sizes, patch_size=patch_size, name=name)
    check_view_lengths(views, row_tokens, name)
    _check_memory(
        -(-int(views.grids.prod(-1).sum()) // row_tokens), row_tokens, patch_size
    )
    planned = views.rows(row_tokens, slots)
    _check_memory(len(planned), row_tokens, patch_size)
    assert planned.views is not None
    slots = slots or int(np.diff(planned.offsets).max())
    packed, _, errors = fill_rows(
        planned,
        lambda i: Record(images[i]),
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        resample=strategy.resample,
        dct=dct,
    )
    for image, error in errors:
        raise ValueError(f"{name(image)} cannot be decoded: {error}") from error
    index = np.stack([planned.index, planned.views["number"]], -1)
    return (packed, slot_array(planned, slots, index, -1)) if return_index else packed


def check_view_lengths(
    views: Views, row_tokens: int, name: Callable[[int], str]
) -> None:
    """Raises ValueError if a view of an image is longer than a row."""
    lengths = views.grids.prod(-1)
    longest = int(lengths.argmax())
    if lengths[longest] > row_tokens:
        rows, columns = views.grids[longest].tolist()
        raise ValueError(
            f"a view of {name(int(views.image[longest]))} has {rows}x{columns} = "
            f"{lengths[longest]} tokens, more than a row of row_tokens={row_tokens}: "
            "raise row_tokens, or leave the image out"
        )


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
      index: `[b, s]` or `[b, s, 2]`, from `pack(..., return_index=True)`.

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
        if index.shape not in (grids.shape[:2], grids.shape):
            raise ValueError(f"index must be {grids.shape[:2]}, not {index.shape}")
        order = index.reshape(*grids.shape[:2], -1)[tuple(filled.T)]
        filled = filled[np.lexsort(order.T[::-1])]
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
