"""Attention within images: a token attends only to tokens of its own segment."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from navit.kernels.splash import SAVED, splash, splash_skip
from navit.kernels.splash_blocks import LANES, SUBLANES, WHOLE_ROW, Segments, spread
from navit.kernels.unpack import split_heads, unpack
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

    Outputs at padding (segment 0) are finite but meaningless. Finite values in another
    segment or in padding never change a bit of a segment's output.

    Values that the backward pass needs and that are costly to recompute are named
    "attention" for `jax.checkpoint_policies.save_only_these_names`.

    Args:
      segment_ids: 0 = padding; with None every token sees its whole row.
      implementation:
        * "xla": the reference: a dense `[n, n]` mask; work grows with n squared.
        * "unpack": gathers every segment into its own row, attends one row at a time so
          that the logits stay in a CPU's cache, and puts the result back. Exact, and 2
          to 17 times as fast on a CPU (`navit.bench.attention_speed`). Needs the two
          bounds below.
        * "splash": a TPU kernel that takes a whole row of up to 1152 tokens in one
          block; the fastest for every such row.
        * "splash_skip": a TPU kernel for longer rows that visits only pairs of blocks
          with a segment in common; work grows with the sum of squared lengths. Row
          lengths must be multiples of 128 tokens for both kernels.
        * None: chosen by platform (`navit.sharding.platform`). On a TPU, one of its
          kernels, or "xla" if the row length is not a multiple of 128. On a CPU,
          "unpack" if the bounds show that it is less work. Otherwise "xla".
      max_segments: the largest segment id that any row may have.
      max_segment_tokens: the longest segment that any row may have. Longer segments
        would be cut, so take this bound from the plan.

    Raises:
      ValueError: if the implementation is unknown, "unpack" has no bounds, or a TPU
        kernel is requested on another platform or for a row length it does not support.
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must have the same shape: "
            "repeat the heads of keys and values that several queries share"
        )
    attend = functools.partial(
        _attend,
        width=q.shape[-1],
        implementation=implementation,
        max_segments=max_segments,
        max_segment_tokens=max_segment_tokens,
    )

    def packed(q: Array, k: Array, v: Array, *ids: Array) -> Array:
        qkv = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (q, k, v)], -1)
        return attend(qkv, *ids).reshape(q.shape)

    return _per_shard(packed, (q, k, v), segment_ids)


def attention_qkvpacked(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments | None,
    *,
    width: int,
    implementation: str | None = None,
    max_segments: int | None = None,
    max_segment_tokens: int | None = None,
) -> Float[Array, "b n d"]:
    """`attention` on one array: the layout one product writes and TPU kernels read.

    Args:
      qkv: the queries of all heads, then all keys, then all values:
        `c = 3 * h * width`. If heads are split over devices, each device has its own
        heads in this order.
      segment_ids: as for `attention`, or the result of `prepared`.
      width: channels of a head.
    """
    attend = functools.partial(
        _attend,
        width=width,
        implementation=implementation,
        max_segments=max_segments,
        max_segment_tokens=max_segment_tokens,
    )
    return _per_shard(attend, (qkv,), segment_ids)


def prepared(segment_ids: Int[Array, "b n"]) -> Int[Array, "b n"] | Segments:
    """Prepares segment ids for TPU kernels, once for all layers."""
    return spread(segment_ids) if platform() == "tpu" else segment_ids


_KERNELS: dict[str, Callable[..., Array]] = {
    "splash": splash,
    "splash_skip": splash_skip,
}


def _attend(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments | None = None,
    *,
    width: int,
    implementation: str | None,
    max_segments: int | None,
    max_segment_tokens: int | None,
) -> Float[Array, "b n d"]:
    """Attention on one device, over its own rows and heads."""
    if segment_ids is None:
        return _dense(qkv, width=width)
    row_tokens, channels = qkv.shape[1], qkv.shape[2] // 3
    if implementation is None:
        less = _less_work(max_segments, max_segment_tokens, row_tokens)
        implementation = _choice(platform(), row_tokens, channels, less)
    if implementation in _KERNELS:
        if platform() != "tpu":
            raise ValueError(
                f"implementation={implementation!r} is a TPU kernel, but this runs on "
                f'a {platform()}: use None, "xla" or "unpack"'
            )
        return _KERNELS[implementation](qkv, segment_ids, width=width)
    ids = segment_ids.ids if isinstance(segment_ids, Segments) else segment_ids
    if implementation == "xla":
        return _dense(qkv, ids, width=width)
    if implementation == "unpack":
        if not max_segments or not max_segment_tokens:
            raise ValueError(
                'implementation="unpack" needs max_segments and max_segment_tokens of '
                f"at least 1, not {max_segments} and {max_segment_tokens}"
            )
        return unpack(
            qkv,
            ids,
            width=width,
            max_segments=max_segments,
            max_segment_tokens=max_segment_tokens,
        )
    raise ValueError(
        f'implementation {implementation!r} is not one of None, "xla", "unpack", '
        '"splash", "splash_skip"'
    )


def _dense(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | None = None,
    *,
    width: int,
) -> Float[Array, "b n d"]:
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(*split_heads(qkv, width), mask=mask)
    return checkpoint_name(out.reshape(*out.shape[:2], -1), SAVED)


def _choice(platform: str, row_tokens: int, channels: int, less_unpacked: bool) -> str:
    if platform == "cpu":
        return "unpack" if less_unpacked else "xla"
    if platform != "tpu":
        return "xla"
    if row_tokens % LANES or channels % (2 * SUBLANES):
        _warn_once(
            f"rows of {row_tokens} tokens and {channels} channels on each device: "
            f"TPU attention kernels need multiples of {LANES} and {2 * SUBLANES}. "
            "Using the dense mask instead, which is several times slower"
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


def _per_shard(
    attend: Callable[..., Array],
    arrays: tuple[Array, ...],
    segment_ids: Array | Segments | None,
) -> Array:
    """Rows and heads are independent, so each device attends over its own."""
    rows, _, heads = (*jax.typeof(arrays[0]).sharding.spec, None, None, None)[:3]
    ids = () if segment_ids is None else (segment_ids,)
    if rows is None and heads is None:
        return attend(*arrays, *ids)
    whole, by_row = jax.P(rows, None, heads), jax.P(rows)
    arrays = jax.tree.map(lambda x: jax.reshard(x, whole), arrays)
    ids = jax.tree.map(lambda x: jax.reshard(x, by_row), ids)
    # check_vma=False: a kernel does not declare the axes over which its results vary.
    mapped: Any = jax.shard_map(
        attend,
        in_specs=(whole,) * len(arrays) + (by_row,) * len(ids),
        out_specs=whole,
        check_vma=False,
    )
    return mapped(*arrays, *ids)
