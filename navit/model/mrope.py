"""Position ids of a language model that reads text and images: M-RoPE and V2PE.

A row holds whole documents of text tokens and visual tokens. The visual tokens of an
image (or of a video clip, or of a frame pair) follow each other and share a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def mrope_ids(
    segment_ids: Int[Array, "b n"],
    image_ids: Int[Array, "b n"],
    coords: Int[Array, "b n 3"],
    grids: Int[Array, "b s 2"],
) -> Int[Array, "b n 3"]:
    """(time, height, width) ids of M-RoPE (arXiv 2409.12191, section 2.1).

    Text counts up on all three. A visual token of an image that starts at id i has
    i plus its coords, and the text after it goes on at i plus the image's longer side,
    as in transformers from version 5.23; version 4 went on after the largest id.

    Args:
      segment_ids: the document of each token; 0 = padding, whose ids are 0.
      image_ids: 0 = text, k = a visual token of the row's slot k-1.
      coords: (time, row, column) of visual tokens on the grid of merged patches. Time
        is 0 for an image and for each frame pair of Qwen3-VL; the number of the frame
        pair for Qwen2-VL; and floor(number * tokens_per_second * seconds_per_grid) for
        Qwen2.5-VL.
      grids: (rows, columns) of merged patches of the image in each slot.
    """
    visual, first = image_ids > 0, _first(segment_ids, image_ids)
    longer = jnp.take_along_axis(grids.max(-1), jnp.maximum(image_ids - 1, 0), 1)
    start = _starts(segment_ids, jnp.where(visual, jnp.where(first, longer, 0), 1))
    start = jnp.where(visual & ~first, start - longer, start)
    ids = start[..., None] + jnp.where(visual[..., None], coords, 0)
    return jnp.where((segment_ids > 0)[..., None], ids, 0)


def v2pe_ids(
    segment_ids: Int[Array, "b n"],
    image_ids: Int[Array, "b n"],
    deltas: Float[Array, "b s"],
) -> Float[Array, "b n"]:
    """Ids in float32 with a smaller step at visual tokens (V2PE, arXiv 2412.09616).

    Visual token k of an image has the id before the image plus `delta * (k + 1)`. The
    text goes on one after the last of them, rounded up, as in OpenGVLab's code.

    Args:
      segment_ids, image_ids: as for `mrope_ids`.
      deltas: the step of each slot's image: 1, 1/2, ... 1/256. Training draws it for
        each image; 1 gives the ids of plain text.
    """
    visual, first = image_ids > 0, _first(segment_ids, image_ids)
    slot = jnp.maximum(image_ids - 1, 0)
    delta = jnp.take_along_axis(deltas.astype(jnp.float32), slot, 1)
    member = jax.nn.one_hot(image_ids - 1, deltas.shape[1], dtype=jnp.int32)
    count = jnp.take_along_axis(member.sum(1), slot, 1)  # tokens of its image
    whole = jnp.ceil(count * delta).astype(jnp.int32)
    step = jnp.where(visual, jnp.where(first, whole, 0), 1)
    start = _starts(segment_ids, step)
    # How many tokens of its image precede a visual token.
    order = (jnp.cumsum(member, 1) * member).sum(-1) - 1
    before = jnp.where(first, start, start - whole) - 1
    ids = jnp.where(visual, before + delta * (order + 1), start)
    return jnp.where(segment_ids > 0, ids.astype(jnp.float32), 0.0)


def mrope_axes(
    sections: Sequence[int], *, interleaved: bool = False
) -> Int[np.ndarray, " m"]:
    """The axis (0 time, 1 height, 2 width) of each of a head's rotary pairs.

    Args:
      sections: how many pairs turn with each: (16, 24, 24) in Qwen2-VL and Qwen2.5-VL,
        in this order; (24, 20, 20) in Qwen3-VL, interleaved.
      interleaved: pairs take turns, and time has those that are left.
    """
    axes = np.repeat(np.arange(3), sections)
    if interleaved:
        pair = np.arange(sum(sections))
        axes = np.zeros_like(pair)
        for axis in (1, 2):
            axes[(pair % 3 == axis) & (pair < 3 * sections[axis])] = axis
    return axes


def mrope_angles(
    ids: Int[Array, "b n 3"], axes: Int[np.ndarray, " m"], theta: float
) -> Float[Array, "b n m"]:
    """The angle of each pair, `id * theta^(-j/m)`, for `navit.model.rotary.rotate`."""
    frequency = theta ** (-np.arange(len(axes)) / len(axes))
    own = ids[..., axes].astype(jnp.float32)
    return own * jnp.asarray(frequency, jnp.float32)[None, None]


def _first(
    segment_ids: Int[Array, "b n"], image_ids: Int[Array, "b n"]
) -> Bool[Array, "b n"]:
    """Whether a token is the first of a run of text or of an image in a document."""
    same = (image_ids[:, 1:] == image_ids[:, :-1]) & (
        segment_ids[:, 1:] == segment_ids[:, :-1]
    )
    return jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True)


def _starts(segment_ids: Int[Array, "b n"], step: Int[Array, "b n"]) -> Array:
    """The sum of the steps before each token in its document."""
    before = jnp.cumsum(step, 1) - step
    fresh = segment_ids[:, 1:] != segment_ids[:, :-1]
    fresh = jnp.pad(fresh, ((0, 0), (1, 0)), constant_values=True)
    # Sums only grow, so the latest start of a document is the largest.
    return before - jax.lax.cummax(jnp.where(fresh, before, 0), axis=1)
