"""How the attention kernels cut up their work, and how they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

# The longest row that `splash` takes: its program grows with the square.
WHOLE_ROW = 1152
LANES, SUBLANES = 128, 8
# Of what is masked: a block with nothing visible adds exactly 0, whatever it holds.
HIDDEN = -3e38


class Segments(NamedTuple):
    """Segment ids, and as the kernels read them: along rows, and down columns."""

    ids: Int[Array, "b n"]
    across: Int[Array, "b r n"]
    down: Int[Array, "b n l"]


def spread(segment_ids: Int[Array, "b n"]) -> Segments:
    """Once for all layers."""
    b, n = segment_ids.shape
    ids = segment_ids.astype(jnp.int32)
    return Segments(
        ids,
        jnp.broadcast_to(ids[:, None], (b, SUBLANES, n)),
        jnp.broadcast_to(ids[:, :, None], (b, n, LANES)),
    )


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel cuts up its work.

    Attributes:
      width: channels of a head.
      heads: computed together; their channels stand side by side in one block.
      queries: in one step of the grid. A multiple of 128 that divides the row.
      keys: in one turn of the loop within a step. The same.
      chunk, chunk_backward: queries whose logits are computed at once.
      lanes: heads are read side by side, in the layout `[b, n, h * k]`; else below one
        another, `[b, h * k, n]`, which wastes nothing where few heads do not fill 128
        lanes (72 channels a head).
      interpret: run on any device, slowly: for tests.
    """

    width: int
    heads: int
    queries: int
    keys: int
    chunk: int
    chunk_backward: int
    lanes: bool
    interpret: Any


def heads_fill_lanes(heads: int, width: int) -> bool:
    """Whether the kernels read `[b, n, h * k]`; else `[b, h * k, n]`."""
    return bool(lane_groups(heads, width))


def lane_groups(heads: int, width: int) -> list[int]:
    """Numbers of heads, not too many for one block, that fill 128 lanes."""
    return [g for g in range(1, 5) if heads % g == 0 and g * width % LANES == 0]


def visited(
    segment_ids: Int[Array, "b n"], *, queries: int, keys: int
) -> Int[Array, "b i 2"]:
    """For each block of queries the blocks of keys to visit: from, and up to.

    Two blocks may share a segment where the ranges of their ids meet.
    """
    b, n = segment_ids.shape
    absent = jnp.iinfo(jnp.int32).max

    def ends(size: int) -> tuple[Array, Array]:
        ids = segment_ids.reshape(b, n // size, size)
        return jnp.where(ids > 0, ids, absent).min(-1), ids.max(-1)

    (q_low, q_high), (k_low, k_high) = ends(queries), ends(keys)
    meet = (q_low[:, :, None] <= k_high[:, None]) & (
        k_low[:, None] <= q_high[..., None]
    )
    first = jnp.argmax(meet, -1)
    end = meet.shape[-1] - jnp.argmax(meet[..., ::-1], -1)
    return jnp.where(meet.any(-1)[..., None], jnp.stack([first, end], -1), 0)


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """A product in a kernel, over an axis of each; exact for float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def vmem_bytes(row_tokens: int, channels: int, dtype: Any) -> int:
    """A row of keys and values twice, its gradients, and the sums of two.

    Blocks of logits and what does not fit in registers have 32 MiB.
    """
    of_token = channels * ((2 * 2 + 3) * jnp.dtype(dtype).itemsize + 2 * 4)
    return row_tokens * (of_token + 2 * LANES * 4) + 32 * 2**20


class Call:
    """One call's shapes, and what both kernels share."""

    def __init__(self, qkv: Array, segments: Segments, blocks: Blocks) -> None:
        self.b, self.n, channels = qkv.shape
        self.width = blocks.width
        self.h = channels // (3 * self.width)
        self.dtype, self.blocks = qkv.dtype, blocks
        self.segments = segments
        self.steps, self.groups = self.n // blocks.queries, self.h // blocks.heads
        self.whole_row = self.n == blocks.queries == blocks.keys
        self.scale = self.width**-0.5
        self.statistics = pl.BlockSpec(
            (None, None, blocks.heads, blocks.queries), lambda b, h, i, *_: (b, h, 0, i)
        )
        self.statistics_shape = jax.ShapeDtypeStruct(
            (self.b, self.groups, blocks.heads, self.n), jnp.float32
        )

    def queries(self, part: int) -> pl.BlockSpec:
        """A block of tokens and one group of heads; parts 0, 1, 2 are q, k, v."""
        return self._spec(part, self.blocks.queries, lambda i: i)

    def row(self, part: int) -> pl.BlockSpec:
        """All tokens of a row, and one group of heads."""
        return self._spec(part, self.n, lambda i: 0)

    def _spec(self, part: int, tokens: int, block: Any) -> pl.BlockSpec:
        channels, first = self.blocks.heads * self.width, part * self.groups
        if self.blocks.lanes:
            return pl.BlockSpec(
                (None, tokens, channels), lambda b, h, i, *_: (b, block(i), first + h)
            )
        return pl.BlockSpec(
            (None, channels, tokens), lambda b, h, i, *_: (b, first + h, block(i))
        )

    def shape(self, parts: int) -> jax.ShapeDtypeStruct:
        channels = parts * self.h * self.width
        row = (self.n, channels) if self.blocks.lanes else (channels, self.n)
        return jax.ShapeDtypeStruct((self.b, *row), self.dtype)

    def flat(self, x: Array) -> Array:
        """To the layout of the blocks, and back."""
        return x if self.blocks.lanes else x.swapaxes(1, 2)

    def three(self, qkv: Array) -> tuple[Array, Array, Array]:
        """One array thrice: blocks say what is read of it."""
        flat = self.flat(qkv)
        return flat, flat, flat

    def __call__(
        self,
        kernel: Any,
        args: tuple[Array, ...],
        *,
        inputs: tuple[pl.BlockSpec, ...],
        outputs: tuple[pl.BlockSpec, ...],
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        scratch: tuple[Any, ...],
        work: int,
        name: str,
    ) -> Sequence[Array]:
        b, n, h, blocks = self.b, self.n, self.h, self.blocks
        ids, across, down = self.segments
        bounds = jnp.zeros(1, jnp.int32)  # all, if the block is the row
        if not self.whole_row:
            bounds = visited(ids, queries=blocks.queries, keys=blocks.keys).reshape(-1)
        pairs = b * h * n * min(n, WHOLE_ROW)
        arrays: list[Any] = [*args[2:], *shapes]
        bytes_moved = sum(x.size * x.dtype.itemsize for x in arrays)
        result: Sequence[Array] = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(b, self.groups, self.steps),
                in_specs=[
                    pl.BlockSpec(
                        (None, SUBLANES, blocks.queries), lambda b, h, i, *_: (b, 0, i)
                    ),
                    pl.BlockSpec((None, n, LANES), lambda b, h, i, *_: (b, 0, 0)),
                    *inputs,
                ],
                out_specs=list(outputs),
                scratch_shapes=scratch,
            ),
            out_shape=list(shapes),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=vmem_bytes(n, blocks.heads * self.width, self.dtype),
            ),
            cost_estimate=pl.CostEstimate(
                flops=work * 2 * pairs * self.width,
                transcendentals=pairs,
                bytes_accessed=bytes_moved,
            ),
            interpret=blocks.interpret,
            name=name,
        )(bounds, across, down, *args)
        return result

    def cut(self, chunk: int) -> list[slice]:
        """The queries of a block, in chunks; the last may be shorter."""
        end = self.blocks.queries
        return [slice(i, min(i + chunk, end)) for i in range(0, end, chunk)]

    def head(self, x: Array, i: int) -> Array:
        """`[n, k]` of one head of a block."""
        channels = slice(i * self.width, (i + 1) * self.width)
        return x[:, channels] if self.blocks.lanes else x[channels].T

    def head_below(self, x: Array, i: int) -> Array:
        """`[k, n]` of one head of a block."""
        channels = slice(i * self.width, (i + 1) * self.width)
        return x[:, channels].T if self.blocks.lanes else x[channels]

    def store(self, ref: Any, heads: list[Array]) -> None:
        """Writes `[k, n]` of each head to a block."""
        x = jnp.concatenate(heads)
        ref[...] = (x.T if self.blocks.lanes else x).astype(ref.dtype)

    def load(self, ref: Any, keys: Any) -> Array:
        """A block's tokens from a row."""
        return ref[keys] if self.blocks.lanes else ref[:, keys]

    def over_keys(self, bounds: Any, visit: Any, carry: Any) -> Any:
        """Visits the blocks of keys that this block of queries needs."""
        if self.whole_row:
            return visit(slice(None), carry)
        at = 2 * (pl.program_id(0) * self.steps + pl.program_id(2))
        size = self.blocks.keys

        def step(j: Array, carry: Any) -> Any:
            return visit(pl.ds(pl.multiple_of(j * size, size), size), carry)

        return jax.lax.fori_loop(bounds[at], bounds[at + 1], step, carry)

    def logits(self, k: Array, qt: Array, seen_by: Array, seen: Array) -> Array:
        """Of `[keys, queries]`, to base 2; what is hidden is very low."""
        same = jnp.tile(seen, (1, qt.shape[1] // LANES)) == seen_by
        return jnp.where(same, dot(k, qt, (1, 0)), HIDDEN)
