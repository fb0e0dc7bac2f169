"""Attention within segments whose work follows the segments' own lengths, for CPUs.

A block of a row is one segment's tokens, or a few short segments. Its queries attend to
the keys from the first to the last of its segments. The number of those keys is rounded
up to one of a few lengths, and each length has a loop over the blocks that have it: the
bounds of the loops are data, the shapes in them are not. A step takes all heads at
once, so that its products are large enough for XLA to divide among cores. The backward
pass recomputes the weights from their saved normalisers, as FlashAttention does (Dao
et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from navit.kernels.splash import SAVED

# Queries and logits of a step, at most: a cache holds them.
QUERIES, LOGITS = 128, 2**21
_LOWEST = float(np.finfo(np.float32).min)
_taken = functools.partial(lax.dynamic_slice_in_dim, axis=1)


def blocks(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segment_ids: Int[Array, "b n"],
    kv_segment_ids: Int[Array, "b m"] | None = None,
    *,
    longest: int | None = None,
    block: int = 128,
) -> Float[Array, "b n h k"]:
    """`attention` (navit.model.attention), a block at a time, in float32.

    Work grows with the sum of squared segment lengths if segments are contiguous;
    others may be in any order, and attend over the keys between as well. Outputs of
    padding are 0.

    Args:
      segment_ids: 0 = padding.
      kv_segment_ids: those of keys and values; None means the same.
      longest: tokens of the longest segment, if known: fewer loops are compiled. Longer
        segments are slower, and as exact.
      block: tokens of a block that holds several segments, at most.
    """
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    block = min(block, _rounded(max(q.shape[1], k.shape[1])))
    lengths = _lengths(block, longest or k.shape[1], max(block, k.shape[1]))
    return _blocks(q, k, v, segment_ids, keys, block, lengths, kv_segment_ids is None)


def _rounded(x: int, multiple: int = 16) -> int:
    return -(-x // multiple) * multiple


def _lengths(block: int, longest: int, row: int) -> tuple[int, ...]:
    """The numbers of keys that have a loop, up to those of a whole row.

    Up to the longest segment, each is at most 1.33 times the one before.
    """
    lengths = [block]
    while lengths[-1] < row:
        start = lengths[-1]
        steps = (1.25, 1.5, 2) if start < longest else (2,)
        lengths += [_rounded(int(start * step)) for step in steps]
    return tuple(sorted({min(x, _rounded(row)) for x in lengths}))


def _queries(keys: int, heads: int) -> int:
    """The queries of a step over so many keys."""
    most = max(64, min(QUERIES, LOGITS // (heads * keys)))
    return _rounded(-(-keys // -(-keys // most)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blocks(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    ids: Int[Array, "b n"],
    key_ids: Int[Array, "b m"],
    block: int,
    lengths: tuple[int, ...],
    own: bool,
) -> Float[Array, "b n h k"]:
    return _forward(q, k, v, ids, key_ids, block, lengths, own)[0]


class _Found(NamedTuple):
    """The blocks, sorted by their numbers of keys; tokens count on through the rows.

    Attributes:
      first: the number of each loop's first block, and of all blocks.
      query: the first token of each block; the block ends before `query_end`.
      key: the first of the keys to attend to; the last is before `key_end`.
      ids: of the queries; -1 = padding.
      key_ids: of the keys; 0 = padding.
    """

    first: Int[Array, " loops_and_1"]
    query: Int[Array, " t"]
    query_end: Int[Array, " t"]
    key: Int[Array, " t"]
    key_end: Int[Array, " t"]
    ids: Int[Array, " n"]
    key_ids: Int[Array, " m"]


def _find(
    ids: Int[Array, "b n"],
    key_ids: Int[Array, "b m"],
    block: int,
    lengths: tuple[int, ...],
    own: bool,
) -> _Found:
    """Walks from block to block: there are far fewer of them than tokens.

    A block holds as many whole runs of tokens of one segment as fit, or one longer run.
    So how a segment is divided does not depend on other segments' ids.

    Args:
      own: whether queries and keys are of the same tokens.
    """
    (b, n), m = ids.shape, key_ids.shape[1]
    place, key_place = (jnp.arange(x, dtype=jnp.int32) for x in (n, m))
    ids, key_ids = ids.astype(jnp.int32), key_ids.astype(jnp.int32)
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def step(carry: Any) -> Any:
        token, count, found = carry
        row, at = token // n, token % n
        segments, start, keys = (
            lax.dynamic_index_in_dim(x, row, 0, False) for x in (ids, starts, key_ids)
        )
        later = start & (place > at)
        last = jnp.where(later & (place <= at + block), place, 0).max()
        last = jnp.where(n <= at + block, n, last)
        end = jnp.where(last > at, last, jnp.where(later, place, n).min())
        held = (place >= at) & (place < end) & (segments > 0)
        low = jnp.where(held, segments, np.iinfo(np.int32).max).min()
        high = jnp.where(held, segments, 0).max()
        visible = (keys >= low) & (keys <= high)
        key_end = jnp.where(visible, key_place + 1, 0).max()
        key = jnp.minimum(jnp.where(visible, key_place, m).min(), key_end)
        if own:  # not from where the first segment starts: it may be removed
            key = jnp.minimum(key, at)
        record = [row * n + at, row * n + end, row * m + key, row * m + key_end]
        found = lax.dynamic_update_slice(found, jnp.stack(record)[:, None], (0, count))
        return row * n + end, count + (high > 0), found

    # Two blocks in a row hold more tokens than `block`. One place more than there can
    # be blocks is where blocks of padding are noted.
    found = jnp.zeros((4, b * (2 * (n // block) + 2) + 1), jnp.int32)
    start = (jnp.int32(0), jnp.int32(0), found)
    _, count, found = lax.while_loop(lambda x: x[0] < b * n, step, start)
    loop = jnp.searchsorted(jnp.array(lengths), found[3] - found[2])
    loop = jnp.where(jnp.arange(found.shape[1]) < count, loop, len(lengths))
    before = loop[:, None] < jnp.arange(len(lengths) + 1)[None]
    first = before.sum(0, dtype=jnp.int32)
    query, query_end, key, key_end = found[:, jnp.argsort(loop)]
    ids = jnp.where(ids > 0, ids, -1).ravel()
    return _Found(first, query, query_end, key, key_end, ids, key_ids.ravel())


class _Step(NamedTuple):
    """A part of a block's queries, and its keys.

    Attributes:
      at: the first query of the slice that holds them; `mine` are they.
      key: the first key of the slice that holds the keys; `seen` are those of `mine`.
    """

    at: Int[Array, ""]
    mine: Bool[Array, " q"]
    key: Int[Array, ""]
    seen: Bool[Array, "q m"]


def _each(
    found: _Found,
    lengths: tuple[int, ...],
    heads: int,
    body: Callable[[_Step, Any], Any],
    carry: Any,
) -> Any:
    """Runs `body(step, carry)` for the queries of all blocks."""

    def held(first: Array, end: Array, ids: Array, size: int) -> tuple[Array, ...]:
        """A slice of that size: its place, which tokens are from first to end, ids."""
        at = jnp.minimum(first, ids.shape[0] - size)
        tokens = at + jnp.arange(size)
        own = (tokens >= first) & (tokens < end)
        return at, own, lax.dynamic_slice_in_dim(ids, at, size)

    def of_block(size: int, keys: int, t: Array, carry: Any) -> Any:
        key, own, key_ids = held(
            found.key[t], found.key_end[t], _longer(found.key_ids, keys), keys
        )
        key_ids = jnp.where(own, key_ids, 0)
        first, end = found.query[t], found.query_end[t]

        def step(i: Array, carry: Any) -> Any:
            at, mine, ids = held(first + i * size, end, _longer(found.ids, size), size)
            seen = jnp.where(mine, ids, -1)[:, None] == key_ids[None]
            return body(_Step(at, mine, key, seen), carry)

        return lax.fori_loop(0, (end - first + size - 1) // size, step, carry)

    for i, keys in enumerate(lengths):
        one = functools.partial(of_block, _queries(keys, heads), keys)
        carry = lax.fori_loop(found.first[i], found.first[i + 1], one, carry)
    return carry


def _longer(x: Array, size: int, axis: int = 0) -> Array:
    """Pads to that size at least."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, size - x.shape[axis]))
    return jnp.pad(x, widths)


def _heads_first(x: Float[Array, "b n h k"], size: int) -> Float[Array, "h r k"]:
    """All rows' tokens in float32, and at least so many."""
    x = x.astype(jnp.float32).transpose(2, 0, 1, 3)
    return _longer(x.reshape(x.shape[0], -1, x.shape[-1]), size, 1)


def _like(x: Float[Array, "h r k"], y: Float[Array, "b n h k"]) -> Array:
    b, n, h, width = y.shape
    x = x[:, : b * n].reshape(h, b, n, width)
    return x.transpose(1, 2, 0, 3).astype(y.dtype)


def _product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    contract = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _put(x: Array, new: Array, at: Array, where: Array, axis: int = 1) -> Array:
    old = lax.dynamic_slice_in_dim(x, at, new.shape[axis], axis)
    new = jnp.where(jnp.expand_dims(where, (0, 3 - axis)), new, old)
    return lax.dynamic_update_slice_in_dim(x, new, at, axis)


def _added(x: Array, new: Array, at: Array) -> Array:
    new = _taken(x, at, new.shape[1]) + new
    return lax.dynamic_update_slice_in_dim(x, new, at, 1)


def _forward(q, k, v, ids, key_ids, block, lengths, own):  # type: ignore[no-untyped-def]
    found = _find(ids, key_ids, block, lengths, own)
    heads, width = q.shape[2:]
    queries = _heads_first(q, max(_queries(x, heads) for x in lengths))
    queries *= width**-0.5
    keys, values = (_heads_first(x, lengths[-1]) for x in (k, v))

    def body(step: _Step, carry: Any) -> Any:
        out, total = carry
        n, m = step.seen.shape
        mine, theirs = _taken(queries, step.at, n), _taken(keys, step.key, m)
        logits = jnp.where(step.seen[None], _product(mine, theirs, (2, 2)), _LOWEST)
        top = logits.max(-1, keepdims=True)
        weights = jnp.where(step.seen[None], jnp.exp(logits - top), 0)
        weight = weights.sum(-1, keepdims=True)
        weight = jnp.where(weight > 0, weight, 1)
        sums = _product(weights, _taken(values, step.key, m), (2, 1))
        out = _put(out, sums / weight, step.at, step.mine)
        return out, _put(total, top + jnp.log(weight), step.at, step.mine)

    zeros = (jnp.zeros_like(queries), jnp.zeros_like(queries[..., :1]))
    out, total = _each(found, lengths, heads, body, zeros)
    out = checkpoint_name(_like(out, q), SAVED)
    return out, (q, k, v, out, checkpoint_name(total, SAVED), found)


def _backward(block, lengths, own, residuals, gradient):  # type: ignore[no-untyped-def]
    del block, own
    q, k, v, out, total, found = residuals
    heads, width = q.shape[2:]
    scale, most = width**-0.5, total.shape[1]
    queries, wanted = _heads_first(q, most) * scale, _heads_first(gradient, most)
    keys, values = (_heads_first(x, lengths[-1]) for x in (k, v))
    common = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    common = _heads_first(common.sum(-1, keepdims=True), most)
    # What has no other use is kept transposed: all products are then in the order in
    # which they are fastest, with the first array's rows times the second's columns.
    columns = keys.transpose(0, 2, 1) * scale
    total, common = (x.transpose(0, 2, 1) for x in (total, common))
    column = functools.partial(lax.dynamic_slice_in_dim, axis=2)

    def body(step: _Step, carry: Any) -> Any:
        of_q, of_k, of_v = carry
        n, m = step.seen.shape
        seen = step.seen.T[None]
        mine, goal = _taken(queries, step.at, n), _taken(wanted, step.at, n)
        theirs, content = _taken(keys, step.key, m), _taken(values, step.key, m)
        logits = _product(theirs, mine, (2, 2))
        weights = jnp.where(seen, jnp.exp(logits - column(total, step.at, n)), 0)
        of_weights = _product(content, goal, (2, 2)) - column(common, step.at, n)
        # Elsewhere it may be infinite times 0.
        of_logits = jnp.where(seen, weights * of_weights, 0)
        here = _product(column(columns, step.key, m), of_logits, (2, 1))
        of_q = _put(of_q, here, step.at, step.mine, 2)
        of_k = _added(of_k, _product(of_logits, mine, (2, 1)), step.key)
        of_v = _added(of_v, _product(weights, goal, (2, 1)), step.key)
        return of_q, of_k, of_v

    zeros = (
        jnp.zeros((heads, width, most)),
        *(jnp.zeros_like(x) for x in (keys, values)),
    )
    of_q, of_k, of_v = _each(found, lengths, heads, body, zeros)
    of_q = of_q.transpose(0, 2, 1)
    gradients = ((of_q, q), (of_k, k), (of_v, v))
    return *(_like(x, y) for x, y in gradients), None, None


_blocks.defvjp(_forward, _backward)
