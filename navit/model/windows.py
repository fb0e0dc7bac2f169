"""Windows of an image, within which some blocks attend (Qwen2.5-VL)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def window_ids(
    segment_ids: Int[Array, "b n"],
    coords: Int[Array, "b n 2"],
    grids: Int[Array, "b s 2"],
    window: int,
) -> Int[Array, "b n"]:
    """Segment ids of windows: 0 at padding, and from 1 on for each window of a row.

    Windows are squares of `window` patches a side from an image's top left; the last
    ones of a row or column of windows may be smaller. Ids go slot by slot and, within
    an image, in raster order (transformers' models/qwen2_5_vl, `get_window_index`).
    """
    sides = -(-grids // window)
    counts = sides.prod(-1)
    before = jnp.cumsum(counts, -1) - counts  # windows in the slots before each
    slot = jnp.maximum(segment_ids - 1, 0)
    across = jnp.take_along_axis(sides[..., 1], slot, 1)
    row, column = coords[..., 0] // window, coords[..., 1] // window
    ids = jnp.take_along_axis(before, slot, 1) + row * across + column + 1
    return jnp.where(segment_ids > 0, ids, 0)


def most_windows(row_tokens: int, slots: int, window: int) -> int:
    """The most windows that a row can have, whatever its images' shapes.

    An image of t tokens has at most 1 + (t - 1) / window, as one of a single row has.
    """
    images = min(slots, row_tokens)
    return images + (row_tokens - images) // window
