"""Attention within segments that gathers each segment into its own row, for CPUs.

A dense mask computes all pairs of a row's tokens, of which only a few are within a
segment. The logits of a gathered segment also stay in a CPU's cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from navit.kernels.splash import SAVED


def unpack(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"],
    *,
    width: int,
    max_segments: int,
    max_segment_tokens: int,
) -> Float[Array, "b n d"]:
    """`attention` (navit.model.attention), segment by segment.

    Args:
      qkv: the queries of all heads, then all keys, then all values:
        `c = 3 * h * width`.
      segment_ids: 0 = padding; segments may be in any order and need not be contiguous.
      width: channels of a head.
      max_segments: the largest segment id that any row may have.
      max_segment_tokens: the longest segment that any row may have; longer ones would
        be cut.
    """
    if max_segments == 1:
        out = _row_by_row(*split_heads(qkv, width), segment_ids > 0)
        return checkpoint_name(out.reshape(*out.shape[:2], -1), SAVED)
    b, n = segment_ids.shape
    s, m = max_segments, min(max_segment_tokens, n)
    # Sorts tokens by segment, padding last, so that segments may be in any order,
    # contiguous or not.
    order = jnp.argsort(jnp.where(segment_ids == 0, s + 1, segment_ids), axis=-1)
    place = jnp.argsort(order, axis=-1)
    member = segment_ids[:, None, :] == jnp.arange(1, s + 1)[:, None]
    counts = member.sum(-1)  # [b, s]
    starts = jnp.cumsum(counts, -1) - counts

    # Maps each unpacked place to its token, and each token to its unpacked place.
    filled = jnp.arange(m) < counts[:, :, None]  # [b, s, m]
    token = jnp.minimum(starts[:, :, None] + jnp.arange(m), n - 1)
    token = jnp.take_along_axis(order, token.reshape(b, s * m), 1)
    keep = filled.reshape(b, s * m)
    real = segment_ids > 0
    slot = jnp.maximum(segment_ids - 1, 0)
    within = jnp.clip(place - jnp.take_along_axis(starts, slot, 1), 0, m - 1)
    target = slot * m + within

    unpacked = _move(qkv, token, keep, target, real).reshape(b * s, m, -1)
    out = _row_by_row(*split_heads(unpacked, width), filled.reshape(b * s, m))
    out = out.reshape(b, s * m, -1)
    return checkpoint_name(_move(out, target, real, token, keep), SAVED)


def split_heads(qkv: Float[Array, "b n c"], width: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, `[b, n, h, k]` each."""
    q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in jnp.split(qkv, 3, -1))
    return q, k, v


def _row_by_row(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    visible: Bool[Array, "b n"],
) -> Float[Array, "b n h k"]:
    """Every token sees the visible ones of its row; one row and one head at a time.

    The outputs of a row with no visible token are finite but meaningless.
    """
    b, n, h, width = q.shape
    # With every token hidden, the softmax would be over nothing.
    visible |= ~visible.any(-1, keepdims=True)
    if n < 128:  # such small products are faster in one batch
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None])

    def head(q: Array, k: Array, v: Array, visible: Array) -> Array:
        logits = jnp.einsum("qk,mk->qm", q, k, preferred_element_type=jnp.float32)
        # Not an added mask: hidden logits may overflow, and inf - inf is NaN.
        logits = jnp.where(visible, logits * width**-0.5, -jnp.inf)
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

    flat = (x.reshape(b, n, h * width) for x in (q, k, v))
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
