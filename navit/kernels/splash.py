"""Attention within segments as TPU kernels (Pallas), forward and backward.

`splash` takes a whole row at once. For each block of queries, `splash_skip` visits only
the blocks of keys that may contain its segments. Both run the same kernels
(`splash_kernels.py`) with different blocks (`splash_blocks.py`). Heads are read where
the projection wrote them, side by side in `[b, n, h * k]`, so nothing is transposed or
padded in memory around a kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from navit.kernels.splash_blocks import (
    LANES,
    SUBLANES,
    WHOLE_ROW,
    Blocks,
    Call,
    Segments,
    lane_groups,
    spread,
    vmem_bytes,
)
from navit.kernels.splash_kernels import backward_kernel, forward_kernel
from navit.sharding import platform

# The name by which remat policies select what the backward pass needs.
SAVED = "attention"


def splash(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments,
    *,
    width: int,
    interpret: bool | pltpu.InterpretParams = False,
    **blocks: int,
) -> Float[Array, "b n d"]:
    """Attention within segments on a TPU, with a whole row in one block.

    Work grows with n squared. No row is too short for this kernel, and rows of up to
    1152 tokens gain nothing from skipping blocks (`navit.bench.attention_speed`).
    Segments may be in any order.

    Args:
      qkv: the queries of all heads, then all keys, then all values:
        `c = 3 * h * width`.
      width: channels of a head.
      interpret: `pltpu.InterpretParams()` simulates the kernel on a CPU, for tests
        (`interpret=True` does not support all TPU operations).
      blocks: sizes that override the chosen ones, see `Blocks`.

    Raises:
      ValueError: if the row length is not a multiple of 128 tokens or exceeds 1152, or
        the heads do not fit the kernels.
    """
    n = qkv.shape[1]
    if n > WHOLE_ROW:
        raise ValueError(
            f"a row of {n} tokens is longer than the {WHOLE_ROW} that "
            '"splash" takes: use "splash_skip"'
        )
    _check_row(n, "splash")
    plan = dict(queries=n, keys=n) | blocks
    segments = segment_ids if isinstance(segment_ids, Segments) else spread(segment_ids)
    return _attend(qkv, segments, _blocks(qkv, width, interpret, **plan))


def splash_skip(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments,
    *,
    width: int,
    interpret: bool | pltpu.InterpretParams = False,
    **blocks: int,
) -> Float[Array, "b n d"]:
    """Attention within segments on a TPU that skips blocks without common segments.

    A block of queries visits the blocks of keys from the first to the last that may
    contain one of its segments. If every segment is contiguous, as the packer lays them
    out, work grows with the sum of their squared lengths. Otherwise the kernel is
    slower but still exact. Padding may be anywhere; blocks of only padding are 0.

    Args:
      qkv, width, interpret, blocks: see `splash`.

    Raises:
      ValueError: if the row length is not a multiple of 128 tokens, or the heads do not
        fit the kernels.
    """
    n = qkv.shape[1]
    _check_row(n, "splash_skip")
    plan = dict(queries=block_size(n), keys=block_size(n)) | blocks
    segments = segment_ids if isinstance(segment_ids, Segments) else spread(segment_ids)
    return _attend(qkv, segments, _blocks(qkv, width, interpret, **plan))


def block_size(row_tokens: int) -> int:
    """Tokens in a block of `splash_skip`: larger blocks visit more hidden pairs."""
    return next(x for x in (512, 384, 256, 128) if row_tokens % x == 0)


def _check_row(n: int, name: str) -> None:
    if n % LANES:
        raise ValueError(
            f"{name!r} needs rows of a multiple of {LANES} tokens, not {n}: pad the "
            'row or use "xla"'
        )


def _blocks(
    qkv: Float[Array, "b n c"], width: int, interpret: Any, **sizes: int
) -> Blocks:
    n, h = qkv.shape[1], qkv.shape[2] // (3 * width)
    groups = [g for g in range(1, h + 1) if h % g == 0]
    # Heads at a time: the compiler interleaves two heads, and one computes while the
    # other waits; short rows gain from more. (Four heads at 1152 tokens are 3 % faster,
    # but take three times as long to compile.) Block sizes are multiples of 128 lanes,
    # or of 16 sublanes.
    most = max(2, min(WHOLE_ROW // n, 4))
    lanes = lane_groups(h, width)
    fit = lanes or [g for g in groups if g * width % (2 * SUBLANES) == 0]
    if not fit or qkv.shape[2] % (3 * width):
        raise ValueError(
            f"{qkv.shape[2]} channels are not queries, keys and values of heads of "
            f'{width} that TPU kernels support: use "xla"'
        )
    room = math.inf
    if platform() == "tpu":
        room = pltpu.get_tpu_info().vmem_capacity_bytes
    in_memory = [g for g in fit if vmem_bytes(n, g * width, qkv.dtype) <= room]
    plan = dict(
        heads=max((g for g in in_memory if g <= most), default=fit[0]),
        # Equal chunks leave fewer gaps than 512, 512 and 128.
        chunk=min(384 if n % 512 and n % 384 == 0 else 512, sizes["queries"]),
        chunk_backward=min(256, sizes["queries"]),
    )
    return Blocks(
        **(plan | sizes),
        width=width,
        lanes=bool(lanes),
        interpret=interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(
    qkv: Float[Array, "b n c"], segments: Segments, blocks: Blocks
) -> Float[Array, "b n d"]:
    return _attend_forward(qkv, segments, blocks)[0]


def _attend_forward(
    qkv: Float[Array, "b n c"], segments: Segments, blocks: Blocks
) -> tuple[Float[Array, "b n d"], tuple[Any, ...]]:
    call = Call(qkv, segments, blocks)
    out, lse = call(
        functools.partial(forward_kernel, call),
        call.three(qkv),
        inputs=(call.queries(0), call.row(1), call.row(2)),
        outputs=(call.queries(0), call.statistics),
        shapes=(call.shape(1), call.statistics_shape),
        scratch=(),
        work=2,
        name="splash_forward",
    )
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return call.flat(out), (qkv, segments, out, lse)


def _attend_backward(
    blocks: Blocks, saved: tuple[Any, ...], gradient: Float[Array, "b n d"]
) -> tuple[Array | None, ...]:
    qkv, segments, out, lse = saved
    call = Call(qkv, segments, blocks)
    channels = blocks.heads * call.width
    # A whole row needs no sums over blocks of queries.
    total = pltpu.VMEM(
        (SUBLANES, LANES) if call.whole_row else (channels, call.n), jnp.float32
    )
    ready = (3, call.n, channels) if blocks.lanes else (3, channels, call.n)
    (dqkv,) = call(
        functools.partial(backward_kernel, call),
        (*call.three(qkv), out, call.flat(gradient.astype(qkv.dtype)), lse),
        inputs=(
            call.queries(0),
            call.row(1),
            call.row(2),
            call.queries(0),
            call.queries(0),
            call.statistics,
        ),
        outputs=(pl.BlockSpec(memory_space=pl.ANY),),
        shapes=(call.shape(3),),
        scratch=(
            pltpu.VMEM(ready, qkv.dtype),
            pltpu.SemaphoreType.DMA((3,)),
            total,
            total,
        ),
        work=5,
        name="splash_backward",
    )
    return call.flat(dqkv), None


_attend.defvjp(_attend_forward, _attend_backward)
