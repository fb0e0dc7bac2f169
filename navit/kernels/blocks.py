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
from jaxtyping import Array, Bool, Float, Int, Shaped

from navit.kernels.splash import SAVED

# A step takes at most QUERIES queries. It takes fewer if they would have more than
# LOGITS logits, which a cache should hold, but never fewer than LEAST.
QUERIES, LOGITS, LEAST = 128, 2**21, 64
_LOWEST = float(np.finfo(np.float32).min)


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
    row = max(block, k.shape[1])
    lengths = _lengths(block, row if longest is None else longest, row)
    return _blocks(q, k, v, segment_ids, keys, block, lengths, kv_segment_ids is None)


def _rounded(x: int) -> int:
    """Up to a multiple of 16."""
    return -(-x // 16) * 16


def _lengths(block: int, longest: int, row: int) -> tuple[int, ...]:
    """The numbers of keys that have a loop, from a block's to a whole row's.

    Up to the longest segment they rise by a third at most, but for rounding to 16, and
    beyond it they double.
    """
    lengths = [block]
    while lengths[-1] < row:
        start = lengths[-1]
        steps = (1.25, 1.5, 2) if start < longest else (2,)
        lengths += [_rounded(int(start * step)) for step in steps]
    return tuple(sorted({min(x, _rounded(row)) for x in lengths}))


def _queries(keys: int, heads: int) -> int:
    """The queries of a step over so many keys."""
    most = max(LEAST, min(QUERIES, LOGITS // (heads * keys)))
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


class _Spans(NamedTuple):
    """Where blocks and their keys are, sorted by the number of keys.

    Rows are padded, and their tokens numbered through all rows.

    Attributes:
      first: the index of each loop's first block; the last entry is their number.
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
    ids: Int[Array, "b padded_n"]
    key_ids: Int[Array, "b padded_m"]


def _find_spans(
    ids: Int[Array, "b n"],
    key_ids: Int[Array, "b m"],
    block: int,
    lengths: tuple[int, ...],
    heads: int,
    own: bool,
) -> _Spans:
    """Walks from block to block: there are far fewer of them than tokens.

    A block holds as many whole runs of tokens of one segment as fit, or one longer run.
    Removing a segment leaves the blocks of others as they are, unless its place and
    other padding become one run.

    Args:
      own: whether queries and keys are of the same tokens.
    """
    longest_step = max(_queries(keys, heads) for keys in lengths)
    ids = _padded(ids.astype(jnp.int32), max(ids.shape[1], longest_step))
    key_ids = _padded(key_ids.astype(jnp.int32), lengths[-1])
    (b, n), m = ids.shape, key_ids.shape[1]
    place, key_place = (jnp.arange(x, dtype=jnp.int32) for x in (n, m))
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
        if own:  # from the block's start, which stays if its first segment is removed
            key = jnp.minimum(key, at)
        record = [row * n + at, row * n + end, row * m + key, row * m + key_end]
        found = lax.dynamic_update_slice(found, jnp.stack(record)[:, None], (0, count))
        return row * n + end, count + (high > 0), found

    # Two neighbouring blocks of a row have more than `block` tokens together. Padding
    # is not counted: the next block overwrites it, or it is in the one place more.
    found = jnp.zeros((4, b * (2 * (n // block) + 2) + 1), jnp.int32)
    start = (jnp.int32(0), jnp.int32(0), found)
    _, count, found = lax.while_loop(lambda x: x[0] < b * n, step, start)
    loop = ((found[3] - found[2])[:, None] > jnp.array(lengths)[None]).sum(1)
    loop = jnp.where(jnp.arange(found.shape[1]) < count, loop, len(lengths))
    before = loop[:, None] < jnp.arange(len(lengths) + 1)[None]
    query, query_end, key, key_end = found[:, jnp.argsort(loop)]
    first = before.sum(0, dtype=jnp.int32)
    ids = jnp.where(ids > 0, ids, -1)
    return _Spans(first, query, query_end, key, key_end, ids, key_ids)


def _padded(x: Shaped[Array, "b n *rest"], size: int) -> Shaped[Array, "b size *rest"]:
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


class _Step(NamedTuple):
    """A part of a block's queries, and its keys.

    Attributes:
      query: the first query of a slice that holds the part.
      inside: which queries of the slice are the part's own.
      key: the first key of a slice that holds the keys.
      seen: which keys of the slice each query attends to.
    """

    query: Int[Array, ""]
    inside: Bool[Array, " q"]
    key: Int[Array, ""]
    seen: Bool[Array, "q m"]


def _each(
    spans: _Spans,
    lengths: tuple[int, ...],
    heads: int,
    body: Callable[[_Step, Any], Any],
    carry: Any,
) -> Any:
    """Runs `body(step, carry)` for the queries of all blocks."""

    def sliced(first: Array, end: Array, ids: Array, size: int) -> tuple[Array, ...]:
        """A slice of that size in one row: its place, what is inside the span, ids."""
        row_end = (first // ids.shape[1] + 1) * ids.shape[1]
        at = jnp.minimum(first, row_end - size)
        tokens = at + jnp.arange(size)
        inside = (tokens >= first) & (tokens < end)
        return at, inside, lax.dynamic_slice_in_dim(ids.ravel(), at, size)

    def of_block(size: int, keys: int, t: Array, carry: Any) -> Any:
        key, inside, key_ids = sliced(
            spans.key[t], spans.key_end[t], spans.key_ids, keys
        )
        key_ids = jnp.where(inside, key_ids, 0)
        first, end = spans.query[t], spans.query_end[t]

        def step(i: Array, carry: Any) -> Any:
            query, inside, ids = sliced(first + i * size, end, spans.ids, size)
            seen = jnp.where(inside, ids, -1)[:, None] == key_ids[None]
            return body(_Step(query, inside, key, seen), carry)

        return lax.fori_loop(0, (end - first + size - 1) // size, step, carry)

    for i, keys in enumerate(lengths):
        one = functools.partial(of_block, _queries(keys, heads), keys)
        carry = lax.fori_loop(spans.first[i], spans.first[i + 1], one, carry)
    return carry


def _heads_first(x: Float[Array, "b n h k"], row: int) -> Float[Array, "h r k"]:
    """All tokens of rows that are padded to that size, in float32."""
    x = _padded(x.astype(jnp.float32), row).transpose(2, 0, 1, 3)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _like(x: Float[Array, "h r k"], y: Float[Array, "b n h k"]) -> Array:
    """The tokens of rows as long as those of y, in its order and dtype."""
    b, n, h, width = y.shape
    x = x.reshape(h, b, -1, width)[:, :, :n]
    return x.transpose(1, 2, 0, 3).astype(y.dtype)


def _product(
    x: Float[Array, "h _ _"], y: Float[Array, "h _ _"], axes: tuple[int, int]
) -> Float[Array, "h _ _"]:
    contract = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


_tokens = functools.partial(lax.dynamic_slice_in_dim, axis=1)
_columns = functools.partial(lax.dynamic_slice_in_dim, axis=2)


def _put(x: Array, new: Array, where: Array, at: Array, axis: int = 1) -> Array:
    """Writes the places of a slice that `where` selects, along an axis of tokens."""
    old = lax.dynamic_slice_in_dim(x, at, new.shape[axis], axis)
    new = jnp.where(where, new, old)
    return lax.dynamic_update_slice_in_dim(x, new, at, axis)


def _add(x: Float[Array, "h r k"], new: Float[Array, "h s k"], at: Array) -> Array:
    new = _tokens(x, at, new.shape[1]) + new
    return lax.dynamic_update_slice_in_dim(x, new, at, 1)


def _forward(q, k, v, ids, key_ids, block, lengths, own):  # type: ignore[no-untyped-def]
    heads, width = q.shape[2:]
    spans = _find_spans(ids, key_ids, block, lengths, heads, own)
    queries = _heads_first(q, spans.ids.shape[1]) * width**-0.5
    keys, values = (_heads_first(x, lengths[-1]) for x in (k, v))

    def body(step: _Step, carry: Any) -> Any:
        out, normalizer = carry
        n, m = step.seen.shape
        inside, seen = step.inside[None, :, None], step.seen[None]
        q, k = _tokens(queries, step.query, n), _tokens(keys, step.key, m)
        logits = jnp.where(seen, _product(q, k, (2, 2)), _LOWEST)
        top = logits.max(-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        sums = _product(weights, _tokens(values, step.key, m), (2, 1))
        out = _put(out, sums / total, inside, step.query)
        return out, _put(normalizer, top + jnp.log(total), inside, step.query)

    zeros = (jnp.zeros_like(queries), jnp.zeros_like(queries[..., :1]))
    out, normalizer = _each(spans, lengths, heads, body, zeros)
    out = checkpoint_name(_like(out, q), SAVED)
    return out, (q, k, v, out, checkpoint_name(normalizer, SAVED), spans)


def _backward(block, lengths, own, residuals, gradient):  # type: ignore[no-untyped-def]
    del block, own
    q, k, v, out, normalizer, spans = residuals
    (heads, width), row = q.shape[2:], spans.ids.shape[1]
    scale = width**-0.5
    queries, gradients = _heads_first(q, row) * scale, _heads_first(gradient, row)
    keys, values = (_heads_first(x, lengths[-1]) for x in (k, v))
    shift = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    shift = _heads_first(shift.sum(-1, keepdims=True), row)
    # Here logits are keys times queries. Three arrays are transposed once, before the
    # loops, so that every product contracts its first array's last axis: the fastest.
    turned_keys = keys.transpose(0, 2, 1) * scale
    normalizer, shift = (x.transpose(0, 2, 1) for x in (normalizer, shift))

    def body(step: _Step, carry: Any) -> Any:
        of_q, of_k, of_v = carry
        n, m = step.seen.shape
        inside, seen = step.inside[None, None], step.seen.T[None]
        q, g = (_tokens(x, step.query, n) for x in (queries, gradients))
        k, v = (_tokens(x, step.key, m) for x in (keys, values))
        logits = _product(k, q, (2, 2)) - _columns(normalizer, step.query, n)
        weights = jnp.where(seen, jnp.exp(logits), 0)
        of_weights = _product(v, g, (2, 2)) - _columns(shift, step.query, n)
        # What is not seen may be infinity times 0.
        of_logits = jnp.where(seen, weights * of_weights, 0)
        here = _product(_columns(turned_keys, step.key, m), of_logits, (2, 1))
        of_q = _put(of_q, here, inside, step.query, axis=2)
        of_k = _add(of_k, _product(of_logits, q, (2, 1)), step.key)
        of_v = _add(of_v, _product(weights, g, (2, 1)), step.key)
        return of_q, of_k, of_v

    zeros = (
        jnp.zeros_like(queries.transpose(0, 2, 1)),
        *(jnp.zeros_like(x) for x in (keys, values)),
    )
    of_q, of_k, of_v = _each(spans, lengths, heads, body, zeros)
    pairs = ((of_q.transpose(0, 2, 1), q), (of_k, k), (of_v, v))
    return *(_like(x, y) for x, y in pairs), None, None


_blocks.defvjp(_forward, _backward)
