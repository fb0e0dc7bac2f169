"""Images of any sizes -> `PackedImages`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np

from navit.batch import PackedImages
from navit.input import memory
from navit.input.fill import fill_rows, slot_array
from navit.plan import geometry
from navit.plan.rows import Rows, pack_rows
from navit.plan.strategies import Strategy
from navit.plan.view_rows import views_of
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
        planned = _planned(
            grids, row_tokens, patch_size, lambda: pack_rows(grids, row_tokens, slots)
        )
        slots = slots or int(np.diff(planned.offsets).max())
    elif slots is None:
        raise ValueError(f"rows={rows} is for a fixed shape: give slots a number too")
    else:
        _check_memory(rows, row_tokens, patch_size)
        planned = _rows_of(grids, rows, row_tokens, slots)
    packed = _filled(
        planned,
        images,
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        dct=dct,
    )
    index = slot_array(np.diff(planned.offsets), slots, planned.index, -1)
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

    views = views_of(strategy, sizes, patch_size=patch_size)
    views.check(name)
    lengths = views.grids.prod(-1)
    longest = int(lengths.argmax())
    if lengths[longest] > row_tokens:
        high, wide = views.grids[longest].tolist()
        raise ValueError(
            f"a view of {name(int(views.image[longest]))} has {high}x{wide} = "
            f"{lengths[longest]} tokens, more than a row of row_tokens={row_tokens}: "
            "raise row_tokens, or leave the image out"
        )
    planned = _planned(
        views.grids, row_tokens, patch_size, lambda: views.rows(row_tokens, slots)
    )
    assert planned.views is not None
    slots = slots or int(np.diff(planned.offsets).max())
    packed = _filled(
        planned,
        images,
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        resample=strategy.resample,
        dct=dct,
    )
    index = np.stack([planned.index, planned.views["number"]], -1)
    counts = np.diff(planned.offsets)
    return (packed, slot_array(counts, slots, index, -1)) if return_index else packed


def _planned(
    grids: np.ndarray, row_tokens: int, patch_size: int, plan: Callable[[], Rows]
) -> Rows:
    """Plans rows of segments with these grids, if they fit in memory."""
    fewest = -(-int(grids.prod(-1).sum()) // row_tokens)
    _check_memory(fewest, row_tokens, patch_size)  # a plan of long rows takes some
    planned = plan()
    _check_memory(len(planned), row_tokens, patch_size)
    return planned


def _filled(
    planned: Rows,
    images: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int,
    row_tokens: int,
    slots: int,
    resample: Literal["bilinear", "bicubic"] = "bilinear",
    dct: str,
) -> PackedImages:
    """Decodes planned rows, and names the first image that cannot be decoded."""
    packed, _, errors = fill_rows(
        planned,
        lambda i: Record(images[i]),
        patch_size=patch_size,
        row_tokens=row_tokens,
        slots=slots,
        resample=resample,
        dct=dct,
    )
    for image, error in errors:
        raise ValueError(
            f"{image_name(images, image)} cannot be decoded: {error}"
        ) from error
    return packed


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
