"""Packed tokens -> an array for each image."""

from __future__ import annotations

from typing import Any

import numpy as np

from navit.batch import PackedImages, PackedTokens


def unpack(
    tokens: Any,
    packed: PackedImages | PackedTokens | None = None,
    index: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Each image's tokens as an array `[rows, columns, d]`: the way back from `pack`.

    Those of a clip in one slot are `[times, rows, columns, d]`.

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
        grid, place = grids[row, slot], coords[row, mine, 0]
        for axis in range(1, len(grid)):
            place = place * grid[axis] + coords[row, mine, axis]
        if not np.array_equal(np.sort(place), np.arange(grid.prod())):
            size = "x".join(map(str, grid))
            raise ValueError(
                f"the image in row {row} slot {slot} has {len(place)} tokens, not each "
                f"one of its {size} grid once: unpack only images without dropped "
                "tokens"
            )
        image = tokens[row, mine][place.argsort()]
        images.append(image.reshape(*grid, -1))
    return images
