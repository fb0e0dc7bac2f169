"""Attention within segments whose work follows the segments' own lengths, for CPUs.

As in FlashAttention (Dao et al. 2022, arXiv:2205.14135), a block of queries visits
blocks of keys one after another, keeps a running softmax, and recomputes the weights in
the backward pass. Here a block of queries holds one segment's tokens, or a few short
segments, and visits only the keys from the first to the last of their segments: the
bounds of the loops are data.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from navit.kernels.splash import SAVED

# Loops that run at the same time at most: each is compiled for itself.
LOOPS = 8
_LOWEST = float(np.finfo(np.float32).min)
_dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def blocks(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segment_ids: Int[Array, "b n"],
    kv_segment_ids: Int[Array, "b m"] | None = None,
    *,
    block: int = 128,
) -> Float[Array, "b n h k"]:
    """`attention` (navit.model.attention), a block of queries at a time, in float32.

    Work grows with the sum of squared segment lengths if segments are contiguous;
    others may be in any order, and visit the keys between as well. Outputs of padding
    are 0.

    Args:
      segment_ids: 0 = padding.
      kv_segment_ids: those of keys and values; None means the same.
      block: tokens of a block of queries, and of keys.
    """
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    block = min(block, -(-max(q.shape[1], k.shape[1]) // 16) * 16)
    return _blocks(q, k, v, segment_ids, keys, block, kv_segment_ids is None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocks(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    ids: Int[Array, "b n"],
    key_ids: Int[Array, "b m"],
    block: int,
    own: bool,
) -> Float[Array, "b n h k"]:
    return _forward(q, k, v, ids, key_ids, block, own)[0]


class _Visits(NamedTuple):
    """The blocks of queries, row by row, and the keys that each visits.

    Attributes:
      first: the number of each row's first block.
      query: the first token of each block; the block ends before `query_end`.
      key: the first of the keys to visit; the last is before `key_end`.
      ids: of the queries, with a block of padding at the end of each row; -1 = padding.
      key_ids: of the keys, alike; 0 = padding.
    """

    first: Int[Array, " b_and_1"]
    query: Int[Array, " t"]
    query_end: Int[Array, " t"]
    key: Int[Array, " t"]
    key_end: Int[Array, " t"]
    ids: Int[Array, "b n_padded"]
    key_ids: Int[Array, "b m_padded"]


def _visits(
    ids: Int[Array, "b n"], key_ids: Int[Array, "b m"], block: int, own: bool
) -> _Visits:
    """Walks from block to block: there are far fewer of them than tokens.

    A block holds whole runs of tokens of one segment, as many as fit, or is a part of
    one longer run. So how a segment is divided does not depend on other segments' ids.

    Args:
      own: whether queries and keys are of the same tokens.
    """
    (b, n), m = ids.shape, key_ids.shape[1]
    place, key_place = (jnp.arange(x, dtype=jnp.int32) for x in (n, m))
    ids, key_ids = ids.astype(jnp.int32), key_ids.astype(jnp.int32)
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def step(carry: Any) -> Any:
        token, count, first, found = carry
        row, at = token // n, token % n
        segments, start, keys = (
            lax.dynamic_index_in_dim(x, row, 0, False) for x in (ids, starts, key_ids)
        )
        full = at + block
        ends = start & (place > at) & (place <= full)
        last = jnp.where(n <= full, n, jnp.where(ends, place, 0).max())
        nearest = jnp.minimum(jnp.where(ends, place, n).min(), full)
        end = jnp.where(start[at] & (last > at), last, nearest)
        held = (place >= at) & (place < end) & (segments > 0)
        low = jnp.where(held, segments, np.iinfo(np.int32).max).min()
        high = jnp.where(held, segments, 0).max()
        visible = (keys >= low) & (keys <= high)
        key_end = jnp.where(visible, key_place + 1, 0).max()
        key = jnp.minimum(jnp.where(visible, key_place, m).min(), key_end)
        if own:  # not from where the first segment starts: it may be removed
            key = jnp.minimum(key, at)
        record = jnp.stack([at, end, key, key_end])
        found = lax.dynamic_update_slice(found, record[:, None], (0, count))
        count = count + (high > 0)
        first = lax.dynamic_update_slice(first, count[None], (row + 1,))
        return row * n + end, count, first, found

    zero = jnp.int32(0)
    # A place more than there can be blocks: where blocks of padding are noted.
    found = jnp.zeros((4, b * n + 1), jnp.int32)
    start = (zero, zero, jnp.zeros(b + 1, jnp.int32), found)
    _, _, first, found = lax.while_loop(lambda x: x[0] < b * n, step, start)
    of_queries = jnp.where(ids > 0, ids, -1)
    of_queries = jnp.pad(of_queries, ((0, 0), (0, block)), constant_values=-1)
    of_keys = jnp.pad(key_ids, ((0, 0), (0, block)))
    query, query_end, key, key_end = found
    return _Visits(first, query, query_end, key, key_end, of_queries, of_keys)


def _loops(units: int) -> int:
    """The number of loops over which heads and rows are divided, for all cores."""
    cores = os.cpu_count() or 1
    sizes = [x for x in range(1, min(units, max(LOOPS, 1)) + 1) if units % x == 0]
    return min(sizes, key=lambda x: (-(-x // cores) / x, x))


def _split(
    x: Float[Array, "b n h k"], block: int, loops: int
) -> list[Float[Array, "r k"]]:
    """In float32, head by head and row by row, a block of zeros after each row."""
    x = x.astype(jnp.float32).transpose(2, 0, 1, 3)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, block), (0, 0)))
    x = x.reshape(loops, -1, x.shape[-1])
    return [x[i] for i in range(loops)]


def _joined(
    parts: list[Float[Array, "r k"]], like: Float[Array, "b n h k"], block: int
) -> Float[Array, "b n h k"]:
    b, n, h, width = like.shape
    x = jnp.stack(parts).reshape(h, b, n + block, width)[:, :, :n]
    return x.transpose(1, 2, 0, 3).astype(like.dtype)


def _taken(x: Array, at: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, block)


def _put(x: Array, at: Array, new: Array, where: Array | None = None) -> Array:
    if where is not None:
        new = jnp.where(where, new, _taken(x, at, new.shape[0]))
    return lax.dynamic_update_slice_in_dim(x, new, at, 0)


def _each(visits: _Visits, loop: int, units: int, body: Any, carry: Any) -> Any:
    """Runs `body(unit, row, t, carry)` for the blocks t of each head and row.

    A unit is a row of one head; this is for units `loop * units` and following.
    """
    rows = visits.first.shape[0] - 1

    def of_unit(unit: Array, carry: Any) -> Any:
        row = (loop * units + unit) % rows
        step = functools.partial(body, unit, row)
        return lax.fori_loop(visits.first[row], visits.first[row + 1], step, carry)

    return lax.fori_loop(0, units, of_unit, carry)


def _ids(ids: Int[Array, "b n"], row: Array, at: Array, block: int) -> Array:
    return lax.dynamic_slice(ids, (row, at), (1, block))[0]


def _forward(q, k, v, ids, key_ids, block, own):  # type: ignore[no-untyped-def]
    visits = _visits(ids, key_ids, block, own)
    width, units = q.shape[-1], q.shape[0] * q.shape[2]
    loops = _loops(units)
    parts = [_split(x, block, loops) for x in (q, k, v)]
    scale = width**-0.5

    def one(loop: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        n, m = (x.shape[0] // (units // loops) for x in (q, k))

        def queries(unit: Array, row: Array, t: Array, carry: Any) -> Any:
            out, total = carry
            at = unit * n + visits.query[t]
            own = _taken(q, at, block) * scale
            segments = _ids(visits.ids, row, visits.query[t], block)

            def visit(carry: Any) -> Any:
                at, sums, top, weight = carry
                keys, values = (_taken(x, unit * m + at, block) for x in (k, v))
                seen = segments[:, None] == _ids(visits.key_ids, row, at, block)[None]
                logits = _dot(own, keys, (((1,), (1,)), ((), ())))
                logits = jnp.where(seen, logits, _LOWEST)
                higher = jnp.maximum(top, logits.max(1))
                weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0)
                shrunk = jnp.exp(top - higher)
                sums = sums * shrunk[:, None]
                sums += _dot(weights, values, (((1,), (0,)), ((), ())))
                return at + block, sums, higher, weight * shrunk + weights.sum(1)

            start = (
                visits.key[t],
                jnp.zeros((block, width)),
                jnp.full(block, _LOWEST),
                jnp.zeros(block),
            )
            end = visits.key_end[t]
            _, sums, top, weight = lax.while_loop(lambda x: x[0] < end, visit, start)
            some = weight > 0
            weight = jnp.where(some, weight, 1)
            mine = jnp.arange(block) < visits.query_end[t] - visits.query[t]
            sums = jnp.where(some[:, None], sums / weight[:, None], 0)
            out = _put(out, at, sums, mine[:, None])
            total = _put(total, at, jnp.where(some, top + jnp.log(weight), 0), mine)
            return out, total

        carry = (jnp.zeros_like(q), jnp.zeros(q.shape[0]))
        return _each(visits, loop, units // loops, queries, carry)

    found = [one(i, *x) for i, x in enumerate(zip(*parts, strict=True))]
    out = checkpoint_name(_joined([x[0] for x in found], q, block), SAVED)
    total = checkpoint_name(jnp.stack([x[1] for x in found]), SAVED)
    return out, (q, k, v, out, total, visits)


def _backward(block, own, residuals, gradient):  # type: ignore[no-untyped-def]
    del own
    q, k, v, out, total, visits = residuals
    width, units = q.shape[-1], q.shape[0] * q.shape[2]
    loops = total.shape[0]
    parts = [_split(x, block, loops) for x in (q, k, v, gradient)]
    scale = width**-0.5
    common = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    common = _split(common[..., None], block, loops)

    def one(loop: int, q: Array, k: Array, v: Array, g: Array, common: Array) -> Any:
        n, m = (x.shape[0] // (units // loops) for x in (q, k))

        def queries(unit: Array, row: Array, t: Array, carry: Any) -> Any:
            of_q, of_k, of_v = carry
            at = unit * n + visits.query[t]
            own = _taken(q, at, block) * scale
            wanted = _taken(g, at, block)
            less, shift = _taken(total[loop], at, block), _taken(common, at, block)
            mine = jnp.arange(block) < visits.query_end[t] - visits.query[t]
            segments = _ids(visits.ids, row, visits.query[t], block)
            segments = jnp.where(mine, segments, -1)

            def visit(carry: Any) -> Any:
                at, sums, of_k, of_v = carry
                place = unit * m + at
                keys, values = (_taken(x, place, block) for x in (k, v))
                seen = _ids(visits.key_ids, row, at, block)[:, None] == segments[None]
                logits = _dot(keys, own, (((1,), (1,)), ((), ())))
                weights = jnp.where(seen, jnp.exp(logits - less[None]), 0)
                of_weights = _dot(values, wanted, (((1,), (1,)), ((), ())))
                of_logits = weights * (of_weights - shift.T)
                # Elsewhere it may be infinite times 0.
                of_logits = jnp.where(seen, of_logits, 0)
                sums += _dot(of_logits, keys, (((0,), (0,)), ((), ())))
                here = _dot(of_logits, own, (((1,), (0,)), ((), ())))
                of_k = _put(of_k, place, _taken(of_k, place, block) + here)
                here = _dot(weights, wanted, (((1,), (0,)), ((), ())))
                of_v = _put(of_v, place, _taken(of_v, place, block) + here)
                return at + block, sums, of_k, of_v

            start = (visits.key[t], jnp.zeros((block, width)), of_k, of_v)
            end = visits.key_end[t]
            _, sums, of_k, of_v = lax.while_loop(lambda x: x[0] < end, visit, start)
            return _put(of_q, at, sums * scale, mine[:, None]), of_k, of_v

        zeros = (jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v))
        return _each(visits, loop, units // loops, queries, zeros)

    found = [one(i, *x) for i, x in enumerate(zip(*parts, common, strict=True))]
    of_q, of_k, of_v = (
        _joined(list(x), like, block)
        for x, like in zip(zip(*found, strict=True), (q, k, v), strict=True)
    )
    return of_q, of_k, of_v, None, None


_blocks.defvjp(_forward, _backward)
