"""Attention within segments as TPU kernels (Pallas), forward and backward.

Both kernels compute logits transposed, `[keys, queries]`. Softmax's maximum and the
running statistics are then rows of a few registers, and in every product with a narrow
result (values, and the gradients of queries, keys and values) the large matrix is the
stationary one, which keeps a TPU's matrix units twice as busy at 64 channels a head as
the usual layout. Heads are read where the projection left them, side by side in
`[b, n, h * k]`, so that nothing is transposed or padded in memory around a kernel.

`splash` takes a whole row at once. `splash_skip` walks, for each block of queries, over
only those blocks of keys that hold one of its segments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# The name under which remat policies find what the backward pass needs.
SAVED = "attention"
# The longest row that `splash` takes: its program grows with the square.
WHOLE_ROW = 1152
LANES, SUBLANES = 128, 8
LOG2E = math.log2(math.e)
# Of what is masked. Less than any maximum can be, so that a block with nothing visible
# adds exactly 0, whatever values it holds.
_HIDDEN, _LOWEST = -3e38, -1e30


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


def splash(
    qkv: Float[Array, "b n c"],
    segment_ids: Int[Array, "b n"] | Segments,
    *,
    width: int,
    interpret: bool | pltpu.InterpretParams = False,
    **blocks: int,
) -> Float[Array, "b n d"]:
    """Attention within segments on a TPU, a whole row in one block.

    Work grows with n squared; no row is too short for it, and rows of up to 1152 tokens
    gain nothing by skipping (`navit.bench.attention`). Segments may stand in any order.

    Args:
      qkv: all heads' queries, then all keys, then all values: `c = 3 * h * width`.
      width: channels of a head.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU, for tests
        (`interpret=True` does not know all that a TPU does).
      blocks: other sizes than those chosen, see `Blocks`.

    Raises:
      ValueError: if the row is no multiple of 128 tokens, or longer than 1152.
    """
    n = qkv.shape[1]
    if n > WHOLE_ROW:
        raise ValueError(
            f"a row of {n} tokens is longer than the {WHOLE_ROW} that "
            '"splash" holds at once: use "splash_skip"'
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
    """Attention within segments on a TPU that skips what no segment needs.

    A block of queries visits the keys from the first to the last block that holds one
    of its segments. With each segment in one piece, as the packer lays them, work grows
    with the sum of their squared lengths. Otherwise it is slower and still exact, as it
    is with padding anywhere. Blocks of nothing but padding are 0.

    Args:
      qkv, width, interpret, blocks: see `splash`.

    Raises:
      ValueError: if the row is no multiple of 128 tokens.
    """
    n = qkv.shape[1]
    _check_row(n, "splash_skip")
    plan = dict(queries=block_size(n), keys=block_size(n)) | blocks
    segments = segment_ids if isinstance(segment_ids, Segments) else spread(segment_ids)
    return _attend(qkv, segments, _blocks(qkv, width, interpret, **plan))


def block_size(row_tokens: int) -> int:
    """The side of the blocks of `splash_skip`: larger ones visit more in vain."""
    return next(x for x in (512, 384, 256, 128) if row_tokens % x == 0)


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


def _check_row(n: int, name: str) -> None:
    if n % LANES:
        raise ValueError(
            f"{name!r} needs rows of a multiple of {LANES} tokens, not {n}: pad the "
            'row, or use "xla"'
        )


def heads_fill_lanes(heads: int, width: int) -> bool:
    """Whether the kernels read `[b, n, h * k]`; else `[b, h * k, n]`."""
    return bool(_lane_groups(heads, width))


def _lane_groups(heads: int, width: int) -> list[int]:
    """Numbers of heads, not too many for one block, that fill 128 lanes."""
    return [g for g in range(1, 5) if heads % g == 0 and g * width % LANES == 0]


def _blocks(qkv: Array, width: int, interpret: Any, **sizes: int) -> Blocks:
    n, h = qkv.shape[1], qkv.shape[2] // (3 * width)
    groups = [g for g in range(1, h + 1) if h % g == 0]
    # Heads at a time: two fill the gaps in one another's schedule, and more those that
    # short rows leave. Blocks are cut at multiples of 128 lanes, or of 16 sublanes.
    enough = max(2, min(WHOLE_ROW // n, 4))
    lanes = _lane_groups(h, width)
    fit = lanes or [g for g in groups if g * width % (2 * SUBLANES) == 0]
    if not fit or qkv.shape[2] % (3 * width):
        raise ValueError(
            f"{qkv.shape[2]} channels are not queries, keys and values of heads of "
            f'{width} that TPU kernels take: use "xla"'
        )
    plan = dict(
        heads=next((g for g in fit if g >= enough), fit[-1]),
        chunk=min(512, sizes["queries"]),
        chunk_backward=min(256, sizes["queries"]),
    )
    return Blocks(
        **(plan | sizes),
        width=width,
        lanes=bool(lanes),
        interpret=interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv: Array, segments: Segments, blocks: Blocks) -> Array:
    return _attend_forward(qkv, segments, blocks)[0]


def _attend_forward(
    qkv: Array, segments: Segments, blocks: Blocks
) -> tuple[Array, tuple[Any, ...]]:
    call = _Call(qkv, segments, blocks)
    out, lse = call(
        functools.partial(_forward_kernel, call),
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
    blocks: Blocks, saved: tuple[Any, ...], gradient: Array
) -> tuple[Array | None, ...]:
    qkv, segments, out, lse = saved
    call = _Call(qkv, segments, blocks)
    channels = blocks.heads * call.width
    # A whole row needs no sums over blocks.
    total = pltpu.VMEM(
        (SUBLANES, LANES) if call.whole_row else (channels, call.n), jnp.float32
    )
    ready = (3, call.n, channels) if blocks.lanes else (3, channels, call.n)
    (found,) = call(
        functools.partial(_backward_kernel, call),
        (*call.three(qkv), out, call.flat(gradient.astype(qkv.dtype)), lse),
        inputs=(
            *(call.queries(0), call.row(1), call.row(2)),
            *(call.queries(0), call.queries(0), call.statistics),
        ),
        outputs=(pl.BlockSpec(memory_space=pl.ANY),),
        shapes=(call.shape(3),),
        scratch=(
            *(pltpu.VMEM(ready, qkv.dtype), pltpu.SemaphoreType.DMA((3,))),
            *(total, total),
        ),
        work=5,
        name="splash_backward",
    )
    return call.flat(found), None


_attend.defvjp(_attend_forward, _attend_backward)


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


class _Call:
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
                vmem_limit_bytes=self.vmem(),
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

    def vmem(self) -> int:
        """Bytes: a row of keys and values twice, its gradients, and the sums of two.

        Blocks of logits and what does not fit in registers have 32 MiB.
        """
        channels = self.blocks.heads * self.width
        of_token = channels * ((2 * 2 + 3) * jnp.dtype(self.dtype).itemsize + 2 * 4)
        return self.n * (of_token + 2 * LANES * 4) + 32 * 2**20

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
        return jnp.where(same, dot(k, qt, (1, 0)), _HIDDEN)


def _forward_kernel(
    call: _Call, bounds: Any, across: Any, down: Any, q: Any, k: Any, v: Any, *out: Any
) -> None:
    g, width, chunk = call.blocks.heads, call.width, call.blocks.chunk
    chunks = call.cut(chunk)
    work = [(h, c) for h in range(g) for c in chunks]
    scaled = q[...] * jnp.asarray(call.scale * LOG2E, call.dtype)
    qt = [call.head_below(scaled, h) for h in range(g)]

    def visit(keys: Any, carry: Any) -> Any:
        kb, vb, seen = call.load(k, keys), call.load(v, keys), down[keys]
        # A row of ones sums the weights in the same product.
        ones = jnp.ones((2 * SUBLANES, seen.shape[0]), call.dtype)
        vt = [jnp.concatenate([call.head_below(vb, h), ones]) for h in range(g)]

        def logits(h: int, c: slice) -> Array:
            return call.logits(call.head(kb, h), qt[h][:, c], across[:1, c], seen)

        # The next logits before this softmax: the units that do them work at once.
        found, ahead = [], logits(*work[0])
        for i, (h, _) in enumerate(work):
            s = ahead
            ahead = logits(*work[i + 1]) if i + 1 < len(work) else s
            top = s.max(0, keepdims=True)
            if carry is None:
                p = jnp.exp2(s - top).astype(call.dtype)
                found.append((top, dot(vt[h], p, (1, 0))))
            else:
                before, total = carry[i]
                top = jnp.maximum(top, before)
                p = jnp.exp2(s - top).astype(call.dtype)
                total = total * jnp.exp2(before - top) + dot(vt[h], p, (1, 0))
                found.append((top, total))
        return found

    start = None
    if not call.whole_row:
        start = [
            (
                jnp.full((1, c.stop - c.start), _LOWEST, jnp.float32),
                jnp.zeros((width + 2 * SUBLANES, c.stop - c.start), jnp.float32),
            )
            for _, c in work
        ]
    found = call.over_keys(bounds, visit, start)
    values, statistics = [], []
    for top, total in found:
        weight = total[width : width + 1]
        # Nothing visited: 0, not 0 / 0.
        weight = jnp.where(weight == 0, 1, weight)
        values.append(total[:width] / weight)
        statistics.append(top + jnp.log2(weight))
    n = len(chunks)
    heads = [slice(h * n, (h + 1) * n) for h in range(g)]
    out_ref, lse_ref = out
    call.store(out_ref, [jnp.concatenate(values[h], 1) for h in heads])
    for i, h in enumerate(heads):
        lse_ref[i : i + 1] = jnp.concatenate(statistics[h], 1)


def _backward_kernel(
    call: _Call,
    bounds: Any,
    across: Any,
    down: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    gradient: Any,
    lse: Any,
    dqkv: Any,
    ready: Any,
    sent: Any,
    dk_total: Any,
    dv_total: Any,
) -> None:
    g, width, chunk = call.blocks.heads, call.width, call.blocks.chunk_backward
    chunks = call.cut(chunk)
    work = [(h, c) for h in range(g) for c in chunks]
    scaled = q[...] * jnp.asarray(call.scale * LOG2E, call.dtype)
    product = out[...].astype(jnp.float32) * gradient[...].astype(jnp.float32)
    qt, dt, delta = [], [], []
    for h in range(g):
        qt.append(call.head_below(scaled, h))
        dt.append(call.head_below(gradient[...], h))
        delta.append(call.head_below(product, h).sum(0, keepdims=True))

    if not call.whole_row:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            dk_total[...] = jnp.zeros_like(dk_total)
            dv_total[...] = jnp.zeros_like(dv_total)

    def visit(keys: Any, carry: Any) -> Any:
        kb, vb, seen = call.load(k, keys), call.load(v, keys), down[keys]
        kt = [call.head_below(kb, h) for h in range(g)]
        dks: list[Any] = [0] * g
        dvs: list[Any] = [0] * g
        found = []
        for i, (h, c) in enumerate(work):
            s = call.logits(call.head(kb, h), qt[h][:, c], across[:1, c], seen)
            p = jnp.exp2(s - lse[h : h + 1, c])
            dp = dot(call.head(vb, h), dt[h][:, c], (1, 0))
            ds = (p * (dp - delta[h][:, c])).astype(call.dtype)
            dvs[h] += dot(dt[h][:, c], p.astype(call.dtype), (1, 1))
            dks[h] += dot(qt[h][:, c], ds, (1, 1))
            x = dot(kt[h], ds, (1, 0))
            found.append(x if carry is None else carry[i] + x)
        if call.whole_row:
            return found, dks, dvs
        dk_total[:, keys] += jnp.concatenate(dks)
        dv_total[:, keys] += jnp.concatenate(dvs)
        return found

    # Gradients go out from `ready`, while the next group of heads is worked on.
    row, group, step = (pl.program_id(i) for i in range(3))

    def copies() -> list[Any]:
        channels = g * width
        found = []
        for part in range(3):
            start = part * call.h * width + group * channels
            at = pl.ds(pl.multiple_of(start, math.gcd(channels, LANES)), channels)
            to = dqkv.at[row, :, at] if call.blocks.lanes else dqkv.at[row, at]
            found.append(pltpu.make_async_copy(ready.at[part], to, sent.at[part]))
        return found

    def wait() -> None:
        for copy in copies():
            copy.wait()

    def send(dks: list[Array], dvs: list[Array]) -> None:
        call.store(ready.at[1], [x / LOG2E for x in dks])
        call.store(ready.at[2], dvs)
        for copy in copies():
            copy.start()

    start, n = None, len(chunks)
    if call.whole_row:
        found, dks, dvs = call.over_keys(bounds, visit, None)
    else:
        start = [jnp.zeros((width, c.stop - c.start), jnp.float32) for _, c in work]
        found = call.over_keys(bounds, visit, start)
    pl.when((group > 0) & (step == 0))(wait)
    heads = [jnp.concatenate(found[h * n : (h + 1) * n], 1) for h in range(g)]
    queries = pl.ds(step * call.blocks.queries, call.blocks.queries)
    dq = ready.at[0, queries] if call.blocks.lanes else ready.at[0, :, queries]
    call.store(dq, [x * call.scale for x in heads])
    if call.whole_row:
        send(dks, dvs)
    else:
        rows = [slice(h * width, (h + 1) * width) for h in range(g)]

        @pl.when(step == call.steps - 1)
        def _() -> None:
            send([dk_total[x] for x in rows], [dv_total[x] for x in rows])

    pl.when((group == call.groups - 1) & (step == call.steps - 1))(wait)
