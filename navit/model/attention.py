"""Attention within images: a token sees the tokens of its own segment alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from navit.model.splash import LANES, SAVED, WHOLE_ROW, splash, splash_skip
from navit.sharding import platform

_log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    segment_ids: Int[Array, "b n"] | None,
    *,
    implementation: str | None = None,
    max_segments: int | None = None,
    max_segment_tokens: int | None = None,
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention among the tokens of the same segment of a row.

    Outputs at padding (segment 0) are finite and mean nothing. Whatever finite values
    stand in another segment or in padding change no bit of a segment's output.

    What the backward pass needs and cannot cheaply have again bears the name
    "attention" for `jax.checkpoint_policies.save_only_these_names`.

    Args:
      segment_ids: 0 = padding; None lets every token see its whole row.
      implementation:
        * "xla": the reference: a dense `[n, n]` mask; work grows with n squared.
        * "unpack": gathers every segment to a row of its own, attends there one row
          at a time so that the logits stay in a CPU's cache, and puts the result back;
          exact, and 2 to 17 times as fast on a CPU (`navit.bench.attention`). Needs
          the two bounds.
        * "splash": a TPU kernel that takes a whole row of up to 1024 tokens in one
          block; wins for every such row.
        * "splash_skip": a TPU kernel that visits only blocks with a segment in common;
          work grows with the sum of squared lengths. For longer rows. Both kernels
          take rows of a multiple of 128 tokens.
        * None: the platform decides (`navit.sharding.platform`). On a TPU one of its
          kernels, or "xla" where the row is no multiple of 128. On a CPU "unpack",
          where the bounds say that it is less work. Else "xla".
      max_segments: no row has a segment id above this.
      max_segment_tokens: no segment is longer. A longer one would be cut, so the bound
        must come from the plan.

    Raises:
      ValueError: for an unknown implementation, "unpack" without its bounds, or a TPU
        kernel on another platform or for a row that it does not take.
    """
    if segment_ids is None:
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v), SAVED)
    if implementation is None:
        less = _less_work(max_segments, max_segment_tokens, q.shape[1])
        implementation = _choice(platform(), q.shape[1], less)
    if implementation in _KERNELS:
        if platform() != "tpu":
            raise ValueError(
                f"implementation={implementation!r} is a TPU kernel, and this runs on "
                f'a {platform()}: use None, "xla" or "unpack"'
            )
        # Its backward pass names what it saves by itself.
        return _per_shard(_KERNELS[implementation], q, k, v, segment_ids)
    if implementation == "xla":
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return checkpoint_name(out, SAVED)
    if implementation == "unpack":
        if max_segments is None or max_segment_tokens is None:
            raise ValueError(
                'implementation="unpack" needs max_segments and max_segment_tokens, '
                f"not {max_segments} and {max_segment_tokens}"
            )
        if max_segments == 1:
            out = _per_shard(_row_by_row, q, k, v, segment_ids > 0)
        else:
            unpack = functools.partial(_unpack, s=max_segments, m=max_segment_tokens)
            out = _per_shard(unpack, q, k, v, segment_ids)
        return checkpoint_name(out, SAVED)
    raise ValueError(
        f'implementation {implementation!r} is not one of None, "xla", "unpack", '
        '"splash", "splash_skip"'
    )


_KERNELS: dict[str, Callable[..., Array]] = {
    "splash": splash,
    "splash_skip": splash_skip,
}


def _choice(platform: str, row_tokens: int, less_unpacked: bool) -> str:
    if platform == "cpu":
        return "unpack" if less_unpacked else "xla"
    if platform != "tpu":
        return "xla"
    if row_tokens % LANES:
        _warn_once(
            f"rows of {row_tokens} tokens are no multiple of {LANES}: attention takes "
            "the dense mask, several times as slow as a TPU's kernels"
        )
        return "xla"
    return "splash" if row_tokens <= WHOLE_ROW else "splash_skip"


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _less_work(segments: int | None, tokens: int | None, row_tokens: int) -> bool:
    if segments is None or tokens is None:
        return False
    return segments * tokens**2 <= row_tokens**2


def _per_shard(attend: Callable[..., Array], *args: Array) -> Array:
    """Rows do not see one another, nor do heads: each device attends to its own."""
    spec = jax.typeof(args[0]).sharding.spec
    rows, heads = (*spec, None, None, None)[0:3:2]
    if rows is None and heads is None:
        return attend(*args)
    whole = jax.P(rows, None, heads)
    specs = tuple(whole if x.ndim == 4 else jax.P(rows) for x in args)
    args = tuple(jax.reshard(x, s) for x, s in zip(args, specs, strict=True))
    # check_vma: a kernel does not say over which axes its results vary.
    mapped: Any = jax.shard_map(
        attend, in_specs=specs, out_specs=whole, check_vma=False
    )
    return mapped(*args)


def _row_by_row(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    visible: Bool[Array, "b n"],
) -> Float[Array, "b n h k"]:
    """Every token sees the visible ones of its row; one row and one head at a time.

    The outputs of a row with nothing visible are finite and mean nothing.
    """
    b, n, h, width = q.shape
    # All hidden would be a softmax over nothing.
    visible |= ~visible.any(-1, keepdims=True)
    if n < 128:  # such small products are faster all at once
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None])

    def head(q: Array, k: Array, v: Array, visible: Array) -> Array:
        logits = jnp.einsum("qk,mk->qm", q, k, preferred_element_type=jnp.float32)
        # Not a sum: what is hidden may have overflowed, and inf - inf is NaN.
        logits = jnp.where(visible, logits * width**-0.5, -jnp.inf)
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - top)
        out = jnp.einsum(
            "qm,mk->qk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    def row(_: None, row: tuple[Array, ...]) -> tuple[None, Array]:
        q, k, v, visible = row
        of_head = [slice(i, i + width) for i in range(0, h * width, width)]
        heads = [head(q[:, i], k[:, i], v[:, i], visible) for i in of_head]
        return None, jnp.concatenate(heads, -1)

    flat = (x.reshape(b, n, h * width) for x in (q, k, v))
    return jax.lax.scan(row, None, (*flat, visible))[1].reshape(q.shape)


def _unpack(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    segment_ids: Int[Array, "b n"],
    *,
    s: int,
    m: int,
) -> Float[Array, "b n h k"]:
    b, n, h, width = q.shape
    m = min(m, n)
    # Tokens in the order of their segments, padding last: holds for segments in any
    # order, contiguous or not.
    order = jnp.argsort(jnp.where(segment_ids == 0, s + 1, segment_ids), axis=-1)
    place = jnp.argsort(order, axis=-1)
    member = segment_ids[:, None, :] == jnp.arange(1, s + 1)[:, None]
    counts = member.sum(-1)  # [b, s]
    starts = jnp.cumsum(counts, -1) - counts

    # For each unpacked place its token, and for each token its unpacked place.
    filled = jnp.arange(m) < counts[:, :, None]  # [b, s, m]
    token = jnp.minimum(starts[:, :, None] + jnp.arange(m), n - 1)
    token = jnp.take_along_axis(order, token.reshape(b, s * m), 1)
    keep = filled.reshape(b, s * m)
    real = segment_ids > 0
    slot = jnp.maximum(segment_ids - 1, 0)
    within = jnp.clip(place - jnp.take_along_axis(starts, slot, 1), 0, m - 1)
    target = slot * m + within

    def unpacked(x: Float[Array, "b n h k"]) -> Float[Array, "bs m h k"]:
        x = _move(x.reshape(b, n, h * width), token, keep, target, real)
        return x.reshape(b * s, m, h, width)

    out = _row_by_row(
        unpacked(q), unpacked(k), unpacked(v), filled.reshape(b * s, m)
    ).reshape(b, s * m, h * width)
    return _move(out, target, real, token, keep).reshape(q.shape)


@jax.custom_vjp
def _move(
    x: Float[Array, "b i d"],
    source: Int[Array, "b j"],
    keep: Bool[Array, "b j"],
    back: Int[Array, "b i"],
    keep_back: Bool[Array, "b i"],
) -> Float[Array, "b j d"]:
    """`out[j] = x[source[j]]` where kept, else 0.

    `back` undoes it (`source[back[i]] == i` where kept), so the gradient is a gather
    too, where autodiff would make a scatter.
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
