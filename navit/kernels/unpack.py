"""Attention within segments that gathers each segment into its own row, for CPUs.

A dense mask computes all pairs of a row's tokens, of which only a few are within a
segment. The logits of a gathered segment also stay in a CPU's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def unpack(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segment_ids: Int[Array, "b n"],
    kv_segment_ids: Int[Array, "b m"] | None = None,
    *,
    max_segments: int,
    max_segment_tokens: int,
) -> Float[Array, "b n h k"]:
    """`attention` (navit.model.attention), segment by segment.

    Args:
      segment_ids: 0 = padding; segments may be in any order and need not be contiguous.
      kv_segment_ids: those of keys and values; None means the same.
      max_segments: the largest segment id that any row may have.
      max_segment_tokens: the longest segment that any row may have, of queries and of
        keys; longer ones would be cut.
    """
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    if max_segments == 1:
        if kv_segment_ids is not None:
            some = (keys > 0).any(-1)[:, None, None, None]
            k, v = (jnp.where(some, x, 0) for x in (k, v))
        return _row_by_row(q, k, v, keys > 0)
    s = max_segments
    places = _places(segment_ids, s, max_segment_tokens)
    if kv_segment_ids is None:  # one gather is faster than three
        of_keys, (q_rows, k_rows, v_rows) = places, _gathered(places, s, q, k, v)
    else:
        of_keys = _places(kv_segment_ids, s, max_segment_tokens)
        (q_rows,) = _gathered(places, s, q)
        k_rows, v_rows = _gathered(of_keys, s, k, v)
    # The keys and values of a segment without any are 0 here, and so is its output.
    visible = of_keys.keep.reshape(q.shape[0] * s, -1)
    out = _row_by_row(q_rows, k_rows, v_rows, visible)
    out = out.reshape(*places.token.shape, -1)
    out = _move(out, places.target, places.real, places.token, places.keep)
    return out.reshape(q.shape)


class _Places(NamedTuple):
    """Where tokens go. There are j places: equally many for each segment.

    Attributes:
      token: the token that each place takes.
      keep: whether a place takes any.
      target: the place that each token goes to.
      real: whether a token goes to any.
    """

    token: Int[Array, "b j"]
    keep: Bool[Array, "b j"]
    target: Int[Array, "b n"]
    real: Bool[Array, "b n"]


def _places(segment_ids: Int[Array, "b n"], segments: int, longest: int) -> _Places:
    b, n = segment_ids.shape
    s, longest = segments, min(longest, n)
    # Sorts tokens by segment, padding last, so that segments may be in any order,
    # contiguous or not.
    order = jnp.argsort(jnp.where(segment_ids == 0, s + 1, segment_ids), axis=-1)
    place = jnp.argsort(order, axis=-1)
    member = segment_ids[:, None] == jnp.arange(1, s + 1)[None, :, None]
    counts = member.sum(-1)  # [b, s]
    starts = jnp.cumsum(counts, -1) - counts
    within = jnp.arange(longest)[None, None]
    filled = within < counts[..., None]  # [b, s, longest]
    token = jnp.minimum(starts[..., None] + within, n - 1)
    slot = jnp.maximum(segment_ids - 1, 0)
    at = jnp.clip(place - jnp.take_along_axis(starts, slot, 1), 0, longest - 1)
    return _Places(
        token=jnp.take_along_axis(order, token.reshape(b, s * longest), 1),
        keep=filled.reshape(b, s * longest),
        target=slot * longest + at,
        real=segment_ids > 0,
    )


def _gathered(
    places: _Places, segments: int, *arrays: Float[Array, "b n h k"]
) -> list[Float[Array, "r i h k"]]:
    """Arrays of one shape, with each segment in a row of its own: r = b * s rows."""
    flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in arrays], -1)
    flat = _move(flat, places.token, places.keep, places.target, places.real)
    rows = flat.reshape(flat.shape[0] * segments, -1, flat.shape[-1])
    heads = arrays[0].shape[2:]
    return [x.reshape(*x.shape[:2], *heads) for x in jnp.split(rows, len(arrays), -1)]


def _row_by_row(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    visible: Bool[Array, "b m"],
) -> Float[Array, "b n h k"]:
    """Every query sees the visible keys of its row; one row and one head at a time.

    In a row with no visible key, queries see all keys, and the output means nothing.
    """
    _, n, h, width = q.shape
    # Otherwise, with every key hidden, the softmax would be over nothing.
    visible |= ~visible.any(-1, keepdims=True)
    if max(n, k.shape[1]) < 128:  # such small products are faster in one batch
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None])

    def head(q: Array, k: Array, v: Array, visible: Array) -> Array:
        logits = jnp.einsum("qk,mk->qm", q, k, preferred_element_type=jnp.float32)
        # Not an added mask: hidden logits may overflow, and inf - inf is NaN.
        logits = jnp.where(visible[None], logits * width**-0.5, -jnp.inf)
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - top)
        out = jnp.einsum(
            "qm,mk->qk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    def row(_: None, row: tuple[Array, ...]) -> tuple[None, Array]:
        q, k, v, visible = row
        slices = [slice(i, i + width) for i in range(0, h * width, width)]
        heads = [head(q[:, i], k[:, i], v[:, i], visible) for i in slices]
        return None, jnp.concatenate(heads, -1)

    flat = (x.reshape(*x.shape[:2], h * width) for x in (q, k, v))
    return jax.lax.scan(row, None, (*flat, visible))[1].reshape(q.shape)


@jax.custom_vjp
def _move(
    x: Float[Array, "b i d"],
    source: Int[Array, "b j"],
    keep: Bool[Array, "b j"],
    back: Int[Array, "b i"],
    keep_back: Bool[Array, "b i"],
) -> Float[Array, "b j d"]:
    """`out[j] = x[source[j]]` where `keep[j]`, else 0.

    `back` is the inverse (`source[back[i]] == i` where `keep_back[i]`), which makes the
    gradient a gather too; autodiff would make it a scatter.
    """
    del back, keep_back
    return jnp.where(
        keep[..., None], jnp.take_along_axis(x, source[..., None], 1), 0
    ).astype(x.dtype)


def _move_forward(x, source, keep, back, keep_back):  # type: ignore[no-untyped-def]
    return _move(x, source, keep, back, keep_back), (source, keep, back, keep_back)


def _move_backward(residuals, gradient):  # type: ignore[no-untyped-def]
    source, keep, back, keep_back = residuals
    return _move(gradient, back, keep_back, source, keep), None, None, None, None


_move.defvjp(_move_forward, _move_backward)
