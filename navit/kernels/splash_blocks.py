"""How the attention kernels divide their work, and how they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# The longest row that `splash` takes: its program grows with the square of the length.
WHOLE_ROW = 1152
LANES, SUBLANES = 128, 8
# The logit of masked pairs: their weight is exactly 0.
HIDDEN = -3e38


class Segments(NamedTuple):
    """Segment ids, and the two forms that the kernels read.

    Attributes:
      ids: 0 = padding.
      across: repeated over 8 sublanes, for queries.
      down: repeated over 128 lanes, for keys.
    """

    ids: Int[Array, "b n"]
    across: Int[Array, "b r n"]
    down: Int[Array, "b n l"]


def spread(segment_ids: Int[Array, "b n"]) -> Segments:
    """Prepares segment ids for the kernels, once for all layers."""
    b, n = segment_ids.shape
    ids = segment_ids.astype(jnp.int32)
    return Segments(
        ids,
        jnp.broadcast_to(ids[:, None], (b, SUBLANES, n)),
        jnp.broadcast_to(ids[:, :, None], (b, n, LANES)),
    )


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel divides its work.

    Attributes:
      width: channels of a head.
      heads: heads computed together; their channels are adjacent in one block.
      queries: queries in one step of the grid. A multiple of 128 that divides the row.
      keys: keys in one iteration of the loop within a step. Also such a multiple.
      chunk, chunk_backward: queries whose logits are computed at once.
      lanes: heads are read side by side, in the layout `[b, n, h * k]`. Otherwise they
        are stacked, `[b, h * k, n]`, which wastes nothing when a few heads do not fill
        128 lanes (72 channels a head).
      interpret: simulate the kernel on any device, slowly, for tests.
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
    """Whether the kernels read `[b, n, h * k]` rather than `[b, h * k, n]`."""
    return bool(lane_groups(heads, width))


def lane_groups(heads: int, width: int) -> list[int]:
    """Numbers of heads, up to four, whose channels are a multiple of 128 lanes."""
    return [g for g in range(1, 5) if heads % g == 0 and g * width % LANES == 0]


def visited(
    segment_ids: Int[Array, "b n"], *, queries: int, keys: int
) -> Int[Array, "b i 2"]:
    """The key blocks that each block of queries visits: the first, and the end.

    Two blocks may share a segment if the ranges of their ids overlap.
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
    """A matrix product in a kernel, contracting axis `over[i]` of each operand.

    Exact for float32. Shapes: `[m, n]` each, or transposed.
    """
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def vmem_bytes(row_tokens: int, channels: int, dtype: Any) -> int:
    """Vector memory of a kernel, in bytes.

    A row of keys and values twice, three gradients and two float32 sums, plus 32 MiB
    for blocks of logits and register spills.
    """
    per_token = channels * ((2 * 2 + 3) * jnp.dtype(dtype).itemsize + 2 * 4)
    return row_tokens * (per_token + 2 * LANES * 4) + 32 * 2**20


class Call:
    """The shapes of one call, and the code that both kernels share."""

    def __init__(
        self, qkv: Float[Array, "b n c"], segments: Segments, blocks: Blocks
    ) -> None:
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
        """A block of tokens of one group of heads; parts 0, 1, 2 are q, k, v."""
        return self._spec(part, self.blocks.queries, lambda i: i)

    def row(self, part: int) -> pl.BlockSpec:
        """All tokens of a row, of one group of heads."""
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
        """Converts `[b, n, c]` to the layout of the blocks, or back."""
        return x if self.blocks.lanes else x.swapaxes(1, 2)

    def three(self, qkv: Array) -> tuple[Array, Array, Array]:
        """The same array three times; the block specs select q, k and v from it."""
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
        bounds = jnp.zeros(1, jnp.int32)  # unused if one block is the whole row
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
        """Slices of a block's queries; the last one may be shorter."""
        end = self.blocks.queries
        return [slice(i, min(i + chunk, end)) for i in range(0, end, chunk)]

    def head(self, x: Array, i: int) -> Array:
        """`[n, k]` of head i of a block in its own layout."""
        channels = slice(i * self.width, (i + 1) * self.width)
        return x[:, channels] if self.blocks.lanes else x[channels].T

    def head_below(self, x: Array, i: int) -> Array:
        """`[k, n]` of head i of a block in its own layout."""
        channels = slice(i * self.width, (i + 1) * self.width)
        return x[:, channels].T if self.blocks.lanes else x[channels]

    def store(self, ref: Any, heads: list[Array]) -> None:
        """Writes heads, `[k, n]` each, to a block."""
        x = jnp.concatenate(heads)
        ref[...] = (x.T if self.blocks.lanes else x).astype(ref.dtype)

    def load(self, ref: Any, keys: Any) -> Array:
        """Reads the given tokens of a row."""
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

    def logits(self, k: Array, qt: Array, query_ids: Array, key_ids: Array) -> Array:
        """Logits to base 2, `[keys, queries]`; `HIDDEN` where segments differ.

        Args:
          k: `[keys, k]`.
          qt: `[k, queries]`.
          query_ids: segment ids, `[1, queries]`.
          key_ids: segment ids, `[keys, 128]`.
        """
        same = jnp.tile(key_ids, (1, qt.shape[1] // LANES)) == query_ids
        return jnp.where(same, dot(k, qt, (1, 0)), HIDDEN)
