"""Attention within images: a token attends only to tokens of its own segment."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from navit.kernels import flash as gpu
from navit.kernels.blocks import blocks
from navit.kernels.splash import SAVED, splash, splash_skip
from navit.kernels.splash_blocks import LANES, SUBLANES, WHOLE_ROW, Segments, spread
from navit.kernels.unpack import unpack
from navit.sharding import AMPERE, compute_capability, platform

_log = logging.getLogger(__name__)
# The implementations that are Pallas kernels, and the platform that each runs on.
KERNELS: dict[str, Any] = {
    "splash": splash,
    "splash_skip": splash_skip,
    "flash": gpu.flash,
}
PLATFORMS = {"splash": "tpu", "splash_skip": "tpu", "flash": "gpu"}
# The dense mask is the only one whose results on a GPU do not rest on kernels that have
# never run on one: `navit.bench.attention_speed` and `navit check` there decide.
ON_GPU = "xla"


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segment_ids: Int[Array, "b n"] | None,
    *,
    kv_segment_ids: Int[Array, "b m"] | None = None,
    implementation: str | None = None,
    max_segments: int | None = None,
    max_segment_tokens: int | None = None,
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention among the tokens of the same segment of a row.

    Outputs at padding (segment 0) are finite but meaningless. Finite values in another
    segment or in padding never change a bit of a segment's output. The output of a
    query whose segment has no keys is 0, and so are its gradients.

    Values that the backward pass needs and that are costly to recompute are named
    "attention" for `jax.checkpoint_policies.save_only_these_names`.

    Args:
      segment_ids: 0 = padding; with None every token sees its whole row.
      kv_segment_ids: the segments of keys and values, for cross-attention: m may differ
        from n. With None they are those of the queries.
      implementation:
        * "xla": the reference: a dense `[n, m]` mask; work grows with n times m.
        * "unpack": gathers every segment into its own row, attends one row at a time so
          that the logits stay in a CPU's cache, and puts the result back. Exact, and
          the fastest on a CPU if all segments are short, or if each row of 129 to 256
          tokens is one segment. Needs the bounds below.
        * "blocks": takes each image, or a few short ones, over the keys that they span.
          On a CPU, work grows with the sum of squared lengths, whatever the lengths:
          with rows of 1024 or more, 2 to 20 times as fast as "xla"
          (`navit.bench.attention_speed`). Exact; needs no bounds. It has no
          forward-mode derivatives (`jax.jvp`).
        * "splash": a TPU kernel that takes a whole row of up to 1152 tokens in one
          block; the fastest for every such row.
        * "splash_skip": a TPU kernel for longer rows that visits only pairs of blocks
          with a segment in common; work grows with the sum of squared lengths. Row
          lengths must be multiples of 128 tokens for both kernels.
        * "flash": GPU kernels that skip in the same way, for compute capability 8.0
          (Ampere) and later. They have never run on a GPU (docs/devices.md).
        * None: chosen by platform (`navit.sharding.platform`). On a TPU, one of its
          kernels, or "xla" if the row length is not a multiple of 128. On a CPU,
          "unpack" if the bounds show that it is the fastest, "xla" if rows are short,
          and otherwise "blocks". On a GPU "xla".

        TPU and GPU kernels take no keys of another length than the queries: with
        `kv_segment_ids`, "xla" runs in their place. For rows that a kernel does not
        support, the choice of None runs in its place, with a warning.
      max_segments: the largest segment id that any row may have.
      max_segment_tokens: the longest segment that any row may have, of queries and of
        keys. Take it from the plan: "unpack" would cut longer segments, and "blocks"
        is slower on them. With max_segments=1, None means the whole row.

    Raises:
      ValueError: if the shapes do not agree, the implementation is unknown, "unpack"
        has no bounds, or a kernel is requested on another platform.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} may differ only in the number "
            "of queries: repeat the heads of keys and values that several queries share"
        )
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids needs the segment_ids of the queries")
    if segment_ids is not None and kv_segment_ids is None and q.shape != k.shape:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys need kv_segment_ids: "
            "segment_ids are those of the queries"
        )
    for name, ids, what, x in (
        ("segment_ids", segment_ids, "queries", q),
        ("kv_segment_ids", kv_segment_ids, "keys", k),
    ):
        if ids is not None and ids.shape != x.shape[:2]:
            raise ValueError(
                f"{name} {ids.shape} and {what} {x.shape} differ in rows or tokens: "
                "give one id for each token"
            )
    if not (q.size and k.size):
        raise ValueError(
            f"q {q.shape} and k {k.shape} need at least one token, head and channel: "
            "leave the call out if there is nothing to attend"
        )

    def attend(arrays: tuple[Array, ...], *ids: Any) -> Array:
        out = _attend(
            arrays,
            *ids,
            width=q.shape[-1],
            implementation=implementation,
            max_segments=max_segments,
            max_segment_tokens=max_segment_tokens,
        )
        return out.reshape(arrays[0].shape)

    return _per_shard(attend, (q, k, v), segment_ids, kv_segment_ids)


def attention_qkvpacked(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments | None,
    *,
    width: int,
    implementation: str | None = None,
    max_segments: int | None = None,
    max_segment_tokens: int | None = None,
) -> Float[Array, "b n d"]:
    """`attention` on queries, keys and values in one array, as the TPU kernels read it.

    A layer's fused product writes this layout, so nothing is copied.

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
    return _per_shard(attend, (qkv,), segment_ids, None)


def prepared(segment_ids: Int[Array, "b n"]) -> Int[Array, "b n"] | Segments:
    """Prepares segment ids for TPU kernels, once for all layers."""
    return spread(segment_ids) if platform() == "tpu" else segment_ids


def _per_shard(
    attend: Callable[..., Array],
    arrays: tuple[Array, ...],
    segment_ids: Array | Segments | None,
    kv_segment_ids: Array | None,
) -> Array:
    """Rows and heads are independent, so each device attends over its own."""
    args = (arrays, segment_ids, kv_segment_ids)
    rows, _, heads = (*jax.typeof(arrays[0]).sharding.spec, None, None, None)[:3]
    if rows is None and heads is None:
        return attend(*args)
    whole = jax.P(rows, None, heads)
    specs = (whole, jax.P(rows), jax.P(rows))
    args = tuple(
        jax.tree.map(functools.partial(jax.reshard, out_shardings=spec), arg)
        for spec, arg in zip(specs, args, strict=True)
    )
    # check_vma=False: a kernel does not declare the axes over which its results vary.
    mapped: Any = jax.shard_map(
        attend, in_specs=specs, out_specs=whole, check_vma=False
    )
    return mapped(*args)


def _attend(
    arrays: tuple[Array, ...],
    segment_ids: Int[Array, "b n"] | Segments | None,
    kv_segment_ids: Int[Array, "b m"] | None,
    *,
    width: int,
    implementation: str | None,
    max_segments: int | None,
    max_segment_tokens: int | None,
) -> Float[Array, "b n d"]:
    """Chooses an implementation and runs it, on one device's rows and heads.

    Args:
      arrays: q, k and v, `[b, n, h, k]` each, or only qkv, `[b, n, c]`.
    """
    n, channels = arrays[0].shape[1], sum(math.prod(x.shape[2:]) for x in arrays) // 3
    longest = max(n, arrays[-1].shape[1])
    if max_segments == 1 and max_segment_tokens is None:
        max_segment_tokens = longest
    crossed = kv_segment_ids is not None and platform() != "cpu"
    if segment_ids is None or (crossed and implementation in (None, *KERNELS)):
        implementation = "xla"
    elif implementation is None and platform() == "cpu":
        implementation = choice_on_cpu(longest, max_segments, max_segment_tokens)
    elif implementation is None:
        implementation = choice(platform(), n, channels)
    assert implementation is not None
    if why := misfit(implementation, n, channels, platform()):
        if PLATFORMS[implementation] != platform():
            raise ValueError(
                f"implementation={implementation!r} {why}: use None, "
                '"xla", "unpack" or "blocks" (model.attention=auto takes None)'
            )
        # An evaluation may have rows of another length. It must not end a long run.
        _warn_once(f"attention {implementation} {why}. Using the usual choice")
        implementation = choice(platform(), n, channels)
    if implementation in KERNELS:
        qkv = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in arrays], -1)
        return KERNELS[implementation](qkv, segment_ids, width=width)
    q, k, v = arrays if len(arrays) == 3 else split_heads(arrays[0], width)
    ids = segment_ids.ids if isinstance(segment_ids, Segments) else segment_ids
    if implementation == "xla":
        out = _dense(q, k, v, ids, kv_segment_ids)
    elif implementation == "blocks":
        assert ids is not None
        out = blocks(q, k, v, ids, kv_segment_ids, longest=max_segment_tokens)
        return out.reshape(*out.shape[:2], -1)  # `blocks` names what it saves
    elif implementation != "unpack":
        raise ValueError(
            f'implementation {implementation!r} is not one of None, "xla", "unpack", '
            '"blocks", "splash", "splash_skip", "flash"'
        )
    elif not max_segments or not max_segment_tokens:
        raise ValueError(
            'implementation="unpack" needs max_segments and max_segment_tokens of '
            f"at least 1, not {max_segments} and {max_segment_tokens}"
        )
    else:
        assert ids is not None
        out = unpack(
            q,
            k,
            v,
            ids,
            kv_segment_ids,
            max_segments=max_segments,
            max_segment_tokens=max_segment_tokens,
        )
    return checkpoint_name(out.reshape(*out.shape[:2], -1), SAVED)


def split_heads(qkv: Float[Array, "b n c"], width: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, `[b, n, h, k]` each."""
    q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in jnp.split(qkv, 3, -1))
    return q, k, v


def _dense(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segment_ids: Int[Array, "b n"] | None,
    kv_segment_ids: Int[Array, "b m"] | None,
) -> Float[Array, "b n h k"]:
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v)
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    mask = segment_ids[:, None, :, None] == keys[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    if kv_segment_ids is None:
        return out  # every token sees itself
    return jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)


def choice_on_cpu(
    row_tokens: int, max_segments: int | None, max_segment_tokens: int | None
) -> str:
    """The implementation that `attention` takes on a CPU if none is given.

    Where each is fastest was measured with `navit.bench.attention_speed`.

    Args:
      row_tokens: of queries or of keys, whichever are more.
    """
    if max_segments and max_segment_tokens:
        less = max_segments * max_segment_tokens**2 <= row_tokens**2
        if less and max_segment_tokens <= 64:
            return "unpack"
    if row_tokens <= 128:
        return "xla"
    return "unpack" if max_segments == 1 and row_tokens <= 256 else "blocks"


def choice(platform: str, row_tokens: int, channels: int) -> str:
    """The implementation that `attention` takes on an accelerator if none is given.

    Args:
      channels: of queries, on each device.
    """
    if platform != "tpu":
        return "xla" if misfit(ON_GPU, row_tokens, channels, platform) else ON_GPU
    name = "splash" if row_tokens <= WHOLE_ROW else "splash_skip"
    if why := misfit(name, row_tokens, channels, platform):
        _warn_once(
            f"attention {name} {why} on each device. Using the dense mask instead, "
            "which is several times slower"
        )
        return "xla"
    return name


def misfit(
    implementation: str, row_tokens: int, channels: int, platform: str
) -> str | None:
    """Returns why an implementation cannot run there, or None if it can.

    Args:
      channels: of queries, on each device.
    """
    if implementation not in KERNELS:
        return None
    if platform != (own := PLATFORMS[implementation]):
        return f"is a {own.upper()} kernel, and this runs on a {platform}"
    if own == "gpu":
        return _misfit_on_gpu()
    if row_tokens % LANES or channels % (2 * SUBLANES):
        return (
            f"takes a multiple of {LANES} tokens in a row and of {2 * SUBLANES} "
            f"channels, not {row_tokens} and {channels}"
        )
    if implementation == "splash" and row_tokens > WHOLE_ROW:
        return f"takes rows of up to {WHOLE_ROW} tokens, not {row_tokens}"
    return None


def _misfit_on_gpu() -> str | None:
    if not gpu.available():
        return "needs Pallas' Triton backend, which this version of jax lacks"
    capability = compute_capability()
    if capability is not None and capability < AMPERE:
        return (
            f"needs compute capability {AMPERE} (Ampere) or later, and this GPU has "
            f"{capability}"
        )
    return None


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)
