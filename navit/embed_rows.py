"""A filled batch -> the vector or the tokens of each segment, in the plan's order."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from navit.batch import PackedImages
from navit.input.fill import Filled
from navit.model.merger import Merger, check_grids
from navit.model.two_tower import normalize
from navit.model.vision import Vision
from navit.plan.rows import Rows
from navit.sharding import split_rows


def vectors_of(
    vision: Vision, part: Rows, filled: Filled, max_tokens: int, *, normalized: bool
) -> np.ndarray:
    """The pooled vector of each planned segment, `[m, e]`.

    Args:
      part: the planned rows of the whole batch.
      filled: this process's share of them.
      max_tokens: the most tokens of a segment.
    """
    placed = split_rows(filled.images, vision.rules)
    slots = np.asarray(embed_packed(vision, placed, max_tokens, normalized))
    return slots[np.arange(slots.shape[1]) < np.diff(part.offsets)[:, None]]


def tokens_of(
    vision: Vision,
    part: Rows,
    filled: Filled,
    max_tokens: int,
    merger: Merger | None = None,
) -> Iterator[np.ndarray | None]:
    """Yields the tokens of each planned segment, float32 `[rows, columns, d]`.

    None for a segment that could not be filled.

    Args:
      part, filled, max_tokens: as in `vectors_of`.
      merger: what merges the tokens, so that there are fewer rows and columns.

    Raises:
      ValueError: if a segment's grid cannot be merged.
    """
    side = 1 if merger is None else merger.config.side
    check_grids(part.grids, side)
    placed = split_rows(filled.images, vision.rules)
    out = _packed_tokens(vision, merger, placed, max_tokens)
    tokens, segment_ids = (np.asarray(x) for x in out)
    for row in range(len(part)):
        planned = range(part.offsets[row], part.offsets[row + 1])
        for slot, i in enumerate(planned):
            # Found by id: a merger moves tokens forward if a segment is missing.
            own = tokens[row, segment_ids[row] == slot + 1]
            yield own.reshape(*part.grids[i] // side, -1) if len(own) else None


@functools.partial(jax.jit, static_argnames=("max_tokens", "normalized"))
def embed_packed(
    vision: Vision, packed: PackedImages, max_tokens: int, normalized: bool
) -> Float[Array, "b s e"]:
    """A vector for each slot, replicated to every device."""
    pooled = vision(packed, max_image_tokens=max_tokens).pooled
    assert pooled is not None
    return vision.rules.replicate(normalize(pooled) if normalized else pooled)


@functools.partial(jax.jit, static_argnames="max_tokens")
def _packed_tokens(
    vision: Vision, merger: Merger | None, packed: PackedImages, max_tokens: int
) -> tuple[Float[Array, "b n d"], Int[Array, "b n"]]:
    """The tokens, merged if there is a merger, in float32, and their segment ids.

    Both are on every device.
    """
    out = vision(packed, max_image_tokens=max_tokens).packed
    out = out if merger is None else merger(out)
    replicate = vision.rules.replicate
    return replicate(out.tokens.astype(jnp.float32)), replicate(out.segment_ids)
