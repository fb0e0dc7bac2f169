"""Attention within segments as GPU kernels (Pallas, through Triton).

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135), a block of queries visits
blocks of keys one after another, keeps a running softmax, and recomputes the weights in
the backward pass. Only blocks that may hold a common segment are visited. Heads are
read where the projection wrote them, side by side in `[b, n, h * k]`.

The kernels have never run on a GPU: tests interpret them on a CPU, and compile them for
GPUs that are not there. jax has deprecated this backend of Pallas since 0.12; without
it, `available` is False and attention takes the dense mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from navit.kernels.splash import SAVED
from navit.kernels.splash_blocks import HIDDEN, Segments, dot, visited

try:
    from jax.experimental.pallas import triton
except ImportError:  # removed from jax
    triton = None  # type: ignore[assignment]

LOG2E = math.log2(math.e)
# The side of a product's operand, at least: that of a GPU's matrix units.
SIDE = 16


def available() -> bool:
    """Whether the installed jax can lower the kernels."""
    return triton is not None


def block_size(row_tokens: int, most: int) -> int:
    """Tokens in a block: the largest power of two up to `most` that divides a row.

    Args:
      most: a power of two.
    """
    return math.gcd(row_tokens, most)


def flash(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments,
    *,
    width: int,
    interpret: Any = False,
    **blocks: int,
) -> Float[Array, "b n d"]:
    """Attention within segments on a GPU that skips blocks without common segments.

    If every segment is contiguous, as the packer lays them out, work grows with the sum
    of their squared lengths. Otherwise the kernels are slower but still exact. Products
    of float32 are exact, not TF32. Outputs and gradients of padding are 0.

    Rows that are not a multiple of 16 tokens are padded to one.

    Args:
      qkv: the queries of all heads, then all keys, then all values:
        `c = 3 * h * width`.
      width: channels of a head.
      interpret: simulate the kernels on a CPU, for tests; any value that is true.
      blocks: sizes that override the chosen ones, see `_Blocks`.

    Raises:
      ValueError: if the channels are not those of such heads.
    """
    if qkv.shape[2] % (3 * width):
        raise ValueError(
            f"{qkv.shape[2]} channels are not queries, keys and values of heads of "
            f"{width}: change the width"
        )
    ids = segment_ids.ids if isinstance(segment_ids, Segments) else segment_ids
    n, more = qkv.shape[1], -qkv.shape[1] % SIDE
    if more:
        qkv = jnp.pad(qkv, ((0, 0), (0, more), (0, 0)))
        ids = jnp.pad(ids, ((0, 0), (0, more)))
    # A block of queries, of keys and of values must fit the smallest shared memory.
    most = 64 if qkv.dtype.itemsize <= 2 else 32
    plan = dict(
        queries=block_size(n + more, 2 * most),
        keys=block_size(n + more, most),
        backward=block_size(n + more, most),
    )
    chosen = _Blocks(**(plan | blocks), width=width, interpret=bool(interpret))
    return _attend(qkv, ids.astype(jnp.int32), chosen)[:, :n]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How the kernels divide their work; sizes are powers of two that divide a row.

    Attributes:
      width: channels of a head.
      queries, keys: tokens of a block of each in the forward pass.
      backward: tokens of a block of either in the backward pass.
    """

    width: int
    queries: int
    keys: int
    backward: int
    interpret: bool

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """A head's channels in powers of two, which Triton needs: (first, number).

        72 channels are 64 and 16, of which the last 8 are zeros.
        """
        found, start = [], 0
        while start < self.width:
            left = self.width - start
            size = SIDE if left < SIDE else 1 << (left.bit_length() - 1)
            found.append((start, size))
            start += size
        return found

    @property
    def padded(self) -> int:
        """Channels of a head, with the zeros of its last piece."""
        start, size = self.pieces[-1]
        return start + size

    def load(self, ref: Any, tokens: Any) -> list[Array]:
        """A block of one head, `[tokens, size]` for each piece."""
        return [
            triton.load(ref.at[tokens, pl.ds(start, size)], mask=mask, other=0)
            for start, size, mask in self._masked()
        ]

    def store(self, ref: Any, tokens: Any, pieces: list[Array]) -> None:
        for (start, size, mask), x in zip(self._masked(), pieces, strict=True):
            at = ref.at[tokens, pl.ds(start, size)]
            triton.store(at, x.astype(ref.dtype), mask=mask)

    def zeros(self, tokens: int) -> list[Array]:
        return [jnp.zeros((tokens, size), jnp.float32) for _, size in self.pieces]

    def _masked(self) -> list[tuple[int, int, Any]]:
        return [
            (start, size, mask)
            for start, size in self.pieces
            for mask in [(start + jnp.arange(size) < self.width)[None]]
        ]


def _products(a: list[Array], b: list[Array]) -> Array:
    """`[m, n]`: the sum over channels of two blocks, `[m, size]` and `[n, size]`."""
    return functools.reduce(
        jnp.add, (dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))
    )


def _added(totals: list[Array], weights: Array, blocks: list[Array]) -> list[Array]:
    """Adds `weights [m, n]` times a block `[n, size]` to totals `[m, size]`."""
    weights = weights.astype(blocks[0].dtype)
    pairs = zip(totals, blocks, strict=True)
    return [total + dot(weights, x, (1, 0)) for total, x in pairs]


def _forward_kernel(
    c: _Blocks, bounds: Any, ids: Any, q: Any, k: Any, v: Any, out: Any, lse: Any
) -> None:
    """Writes a block's outputs, and the logarithms to base 2 of its softmax sums."""
    own = _tokens(pl.program_id(0), c.queries)
    queries, segments = c.load(q, own), _segments(ids, own)

    def visit(j: Array, carry: Any) -> Any:
        top, weight, totals = carry
        keys = _tokens(j, c.keys)
        seen = segments[:, None] == ids[keys][None]
        s = _products(queries, c.load(k, keys)) * (c.width**-0.5 * LOG2E)
        s = jnp.where(seen, s, HIDDEN)
        higher = jnp.maximum(top, s.max(1))
        p = jnp.where(seen, jnp.exp2(s - higher[:, None]), 0.0)
        shrunk = jnp.exp2(top - higher)
        totals = [x * shrunk[:, None] for x in totals]
        totals = _added(totals, p, c.load(v, keys))
        return higher, weight * shrunk + p.sum(1), totals

    start = (
        jnp.full((c.queries,), HIDDEN, jnp.float32),
        jnp.zeros((c.queries,), jnp.float32),
        c.zeros(c.queries),
    )
    top, weight, totals = jax.lax.fori_loop(bounds[0], bounds[1], visit, start)
    some = weight > 0
    weight = jnp.where(some, weight, 1.0)
    c.store(out, own, [x / weight[:, None] for x in totals])
    lse[...] = jnp.where(some, top + jnp.log2(weight), 0.0)


def _backward_kernel(
    c: _Blocks,
    bounds: Any,
    ids: Any,
    q: Any,
    k: Any,
    v: Any,
    gradient: Any,
    lse: Any,
    shift: Any,
    dq: Any,
    dk: Any,
    dv: Any,
) -> None:
    """The gradients of a block of keys and values, then of the same block of queries.

    Which blocks meet is symmetric, so both loops have the same bounds.
    """
    scale, own = c.width**-0.5, _tokens(pl.program_id(0), c.backward)
    segments = _segments(ids, own)

    def weights(s: Array, seen: Array, less: Array) -> Array:
        return jnp.where(seen, jnp.exp2(s * (scale * LOG2E) - less), 0.0)

    keys, values = c.load(k, own), c.load(v, own)

    def of_keys(j: Array, carry: Any) -> Any:
        to_k, to_v = carry
        at = _tokens(j, c.backward)
        queries, wanted = c.load(q, at), c.load(gradient, at)
        seen = segments[:, None] == ids[at][None]
        p = weights(_products(keys, queries), seen, lse[at][None])
        to_v = _added(to_v, p, wanted)
        ds = p * (_products(values, wanted) - shift[at][None])
        # Elsewhere it may be infinite times 0.
        return _added(to_k, jnp.where(seen, ds, 0.0), queries), to_v

    zeros = c.zeros(c.backward), c.zeros(c.backward)
    to_k, to_v = jax.lax.fori_loop(bounds[0], bounds[1], of_keys, zeros)
    c.store(dk, own, [x * scale for x in to_k])
    c.store(dv, own, to_v)

    queries, wanted = c.load(q, own), c.load(gradient, own)
    less, shifts = lse[own], shift[own]

    def of_queries(j: Array, to_q: Any) -> Any:
        at = _tokens(j, c.backward)
        keys = c.load(k, at)
        seen = segments[:, None] == ids[at][None]
        p = weights(_products(queries, keys), seen, less[:, None])
        ds = p * (_products(wanted, c.load(v, at)) - shifts[:, None])
        return _added(to_q, jnp.where(seen, ds, 0.0), keys)

    start = c.zeros(c.backward)
    to_q = jax.lax.fori_loop(bounds[0], bounds[1], of_queries, start)
    c.store(dq, own, [x * scale for x in to_q])


def _tokens(block: Array, size: int) -> Any:
    return pl.ds(block * size, size)


def _segments(ids: Any, tokens: Any) -> Array:
    """The ids of a block's tokens; -1 for padding, which then equals no other token.

    Otherwise padding would see padding in the blocks that happen to be visited. Those
    may differ between the passes, and a weight could be infinite.
    """
    own = ids[tokens]
    return jnp.where(own > 0, own, -1)


class _Call:
    """The shapes of one call, and how its kernels are called."""

    def __init__(self, qkv: Array, ids: Array, blocks: _Blocks) -> None:
        self.b, self.n, channels = qkv.shape
        self.h = channels // (3 * blocks.width)
        self.ids, self.blocks, self.dtype = ids, blocks, qkv.dtype
        # [b, n, 3 * h, k]: the block specs select q, k and v from it.
        self.qkv = qkv.reshape(self.b, self.n, 3 * self.h, blocks.width)
        self.shape = jax.ShapeDtypeStruct(
            (self.b, self.n, self.h, blocks.width), self.dtype
        )
        self.statistics = jax.ShapeDtypeStruct((self.b, self.h, self.n), jnp.float32)

    def head(self, part: int) -> pl.BlockSpec:
        """All tokens of a row, of one head; parts 0, 1, 2 are q, k, v."""
        first = part * self.h
        return pl.BlockSpec(
            (None, self.n, None, self.blocks.padded),
            lambda i, h, b: (b, 0, first + h, 0),
        )

    def row(self) -> pl.BlockSpec:
        """The statistics of all tokens of a row, of one head."""
        return pl.BlockSpec((None, None, self.n), lambda i, h, b: (b, h, 0))

    def __call__(
        self,
        kernel: Callable[..., None],
        name: str,
        queries: int,
        keys: int,
        args: tuple[Array, ...],
        inputs: list[pl.BlockSpec],
        outputs: list[pl.BlockSpec],
        shapes: list[jax.ShapeDtypeStruct],
    ) -> Any:
        bounds = visited(self.ids, queries=queries, keys=keys)
        # A loop over blocks of four warps; of eight, if a head is wide.
        warps = 4 if self.blocks.padded <= 64 else 8
        return pl.pallas_call(
            functools.partial(kernel, self.blocks),
            grid=(self.n // queries, self.h, self.b),
            in_specs=[
                pl.BlockSpec((None, None, 2), lambda i, h, b: (b, i, 0)),
                pl.BlockSpec((None, self.n), lambda i, h, b: (b, 0)),
                *(self.head(part) for part in range(3)),
                *inputs,
            ],
            out_specs=outputs,
            out_shape=shapes,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
            interpret=self.blocks.interpret,
            name=name,
        )(bounds, self.ids, self.qkv, self.qkv, self.qkv, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(
    qkv: Float[Array, "b n c"], ids: Int[Array, "b n"], blocks: _Blocks
) -> Float[Array, "b n d"]:
    return _attend_forward(qkv, ids, blocks)[0]


def _attend_forward(
    qkv: Float[Array, "b n c"], ids: Int[Array, "b n"], blocks: _Blocks
) -> tuple[Float[Array, "b n d"], tuple[Any, ...]]:
    call = _Call(qkv, ids, blocks)
    statistics = pl.BlockSpec((None, None, blocks.queries), lambda i, h, b: (b, h, i))
    out, lse = call(
        _forward_kernel,
        "flash_forward",
        blocks.queries,
        blocks.keys,
        (),
        [],
        [call.head(0), statistics],
        [call.shape, call.statistics],
    )
    out = checkpoint_name(out.reshape(call.b, call.n, -1), SAVED)
    return out, (qkv, ids, out, checkpoint_name(lse, SAVED))


def _attend_backward(
    blocks: _Blocks, saved: tuple[Any, ...], gradient: Float[Array, "b n d"]
) -> tuple[Array | None, ...]:
    qkv, ids, out, lse = saved
    call = _Call(qkv, ids, blocks)
    wanted = gradient.astype(qkv.dtype).reshape(call.shape.shape)
    shift = wanted.astype(jnp.float32) * out.reshape(wanted.shape).astype(jnp.float32)
    parts = call(
        _backward_kernel,
        "flash_backward",
        blocks.backward,
        blocks.backward,
        (wanted, lse, shift.sum(-1).swapaxes(1, 2)),
        [call.head(0), call.row(), call.row()],
        [call.head(0)] * 3,
        [call.shape] * 3,
    )
    return jnp.concatenate(parts, 2).reshape(qkv.shape), None


_attend.defvjp(_attend_forward, _attend_backward)
