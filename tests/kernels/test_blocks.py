import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit.kernels import blocks as module
from navit.kernels.blocks import blocks
from navit.kernels.splash import SAVED
from navit.model.attention import attention, choice_on_cpu

BLOCK = 32


def segments_of(lengths, tokens):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, tokens - len(ids))).astype(np.int32)


ROWS = np.stack(
    [
        segments_of([5, 9, 18, 70, 31, 2, 2, 40], 200),
        segments_of([200], 200),
        segments_of([], 200),
        segments_of([1] * 40, 200),
        np.roll(segments_of([33, 65], 200), 60),
    ]
)


def spans(ids, key_ids, own):
    """Each loop's blocks, as (first query, end, first key, end), and its keys.

    Also the ids of queries and keys in rows as they are padded.
    """
    lengths = module._lengths(BLOCK, key_ids.shape[1], key_ids.shape[1])
    arrays = jax.tree.map(jnp.asarray, (ids, key_ids))
    found = map(np.asarray, module._find_spans(*arrays, BLOCK, lengths, 1, own))
    first, *lists, ids, key_ids = found
    loops = [
        (keys, list(zip(*(x[a:b] for x in lists), strict=True)))
        for keys, (a, b) in zip(lengths, itertools.pairwise(first), strict=True)
    ]
    return loops, np.maximum(ids, 0), key_ids


@pytest.mark.parametrize("own", [True, False])
def test_every_query_is_in_one_block_that_has_all_its_keys(own, rng):
    ids = np.stack([*ROWS, rng.permutation(ROWS[0])])
    keys = ids if own else rng.permuted(ids, axis=1)[:, :150]
    loops, ids, keys = spans(ids, keys, own)
    seen = np.zeros(ids.size, int)
    place = np.arange(keys.size)
    for most, listed in loops:
        for start, end, key, key_end in listed:
            assert end - start > 0 and 0 <= key_end - key <= most
            seen[start:end] += 1
            of_block = ids.ravel()[start:end]
            assert end - start <= BLOCK or len(np.unique(of_block)) == 1
            needed = np.isin(keys.ravel(), of_block[of_block > 0])
            needed &= place // keys.shape[1] == start // ids.shape[1]
            assert not needed[(place < key) | (place >= key_end)].any()
    assert (seen[ids.ravel() > 0] == 1).all() and seen.max(initial=0) <= 1


def test_work_follows_the_squared_lengths(rng):
    """Of a segment, at most 1.4 times its keys and 16; short ones share a block."""
    for _ in range(20):
        lengths, work = rng.integers(1, 120, 6), 0
        ids = segments_of(lengths, 800)[None]
        for keys, listed in spans(ids, ids, True)[0]:
            size = module._queries(keys, 1)
            work += sum(-((a - b) // size) * size * keys for a, b, *_ in listed)
        rounded = np.maximum(BLOCK, 1.4 * lengths + 16)
        assert work <= (rounded**2).sum()
    ids = segments_of([4] * 40, 800)[None]
    assert sum(len(x) for _, x in spans(ids, ids, True)[0]) == 40 * 4 // BLOCK


@pytest.mark.parametrize("longest", [None, 64, 729, 4096])
def test_the_numbers_of_keys_rise_to_a_whole_row(longest):
    lengths = module._lengths(128, longest or 4090, 4090)
    assert lengths[0] == 128 and lengths[-1] == 4096
    for a, b in itertools.pairwise(lengths):
        assert a < b <= (a * 1.34 if b <= (longest or 4090) else a * 2)


def test_a_segment_alone_has_the_same_bits_as_among_others(rng):
    """Removing others changes no bit: nor of values, nor of gradients."""
    arrays = rng.normal(size=(4, *ROWS.shape, 2, 8)).astype(np.float32)
    q, k, v, weight = map(jnp.asarray, arrays)

    @jax.jit
    def both(ids):
        def attend(*qkv):
            return blocks(*qkv, ids, block=BLOCK)

        out, back = jax.vjp(attend, q, k, v)
        return out, *back(weight)

    together = both(ROWS)
    for segment in (1, 2, 3, 4, 5, 8):
        own = segment == ROWS
        for a, b in zip(together, both(ROWS * own), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[own], np.asarray(b)[own])
            assert (np.asarray(b)[~own] == 0).all()


@pytest.mark.parametrize("longest", [None, 200, 40])
def test_values_and_gradients_whatever_is_said_of_the_longest(longest, rng):
    q, k, v = rng.normal(size=(3, *ROWS.shape, 3, 8)).astype(np.float32)
    weight = rng.normal(size=q.shape) * (ROWS > 0)[..., None, None]

    def results(attend):
        def total(q, k, v):
            out = attend(q, k, v, jnp.asarray(ROWS))
            return (out * weight).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    found = results(lambda *x: blocks(*x, block=BLOCK, longest=longest))
    expected = results(lambda *x: attention(*x, implementation="xla"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_row_stays_in_it(bad, rng):
    """Also where the slice that holds a segment would go on into the next row."""
    ids = jnp.asarray(np.stack([segments_of([100, 90], 200)] * 3))
    clean = rng.normal(size=(3, *ids.shape, 2, 8)).astype(np.float32)
    broken = clean.copy()
    broken[:, 1] = bad

    @jax.jit
    def both(*qkv):
        out, back = jax.vjp(lambda *x: blocks(*x, ids, block=BLOCK), *qkv)
        return out, *back(qkv[0])

    for a, b in zip(both(*clean), both(*broken), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[::2], np.asarray(b)[::2])


@pytest.mark.parametrize("n, m", [(1, 1), (5, 1), (1, 40), (33, 131), (131, 7)])
def test_any_numbers_of_queries_and_keys(n, m, rng):
    ids, key_ids = (np.sort(rng.integers(0, 4, (2, x)))[:, ::-1] for x in (n, m))
    ids, key_ids = (jnp.asarray(x, jnp.int32) for x in (ids, key_ids))
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, x, 2, 8)), jnp.float32) for x in (n, m, m)
    )

    def results(implementation):
        def total(*qkv):
            out = attention(
                *qkv, ids, kv_segment_ids=key_ids, implementation=implementation
            )
            return (out * (ids > 0)[..., None, None] * q).sum()

        return jax.tree.leaves(jax.value_and_grad(total, (0, 1, 2))(q, k, v))

    for a, b in zip(results("blocks"), results("xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_bfloat16_gradients_stay_close(rng):
    q, k, v = rng.normal(size=(3, *ROWS.shape, 2, 8)).astype(np.float32)

    @jax.jit
    def gradients(*qkv):
        def total(*qkv):
            out = blocks(*qkv, jnp.asarray(ROWS), block=BLOCK)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(total, (0, 1, 2))(*qkv)

    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    high = gradients(*(x.astype(jnp.float32) for x in low))
    for a, b in zip(gradients(*low), high, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.05)


def test_saved_values_spare_the_loops_of_the_forward_pass():
    """All but the walks along the blocks, which are cheap."""
    x = jnp.zeros((1, 200, 2, 8))

    def loops(policy):
        def attend(x):
            return blocks(x, x, x, jnp.asarray(ROWS[:1])).sum()

        if policy is not None:
            attend = jax.checkpoint(attend, policy=policy)
        both = jax.jit(jax.value_and_grad(attend))
        return both.lower(x).as_text().count("stablehlo.while")

    saved = loops(jax.checkpoint_policies.save_only_these_names(SAVED))
    everything = loops(jax.checkpoint_policies.nothing_saveable)
    assert saved <= loops(None) + 1 < everything


@pytest.mark.parametrize(
    "tokens, segments, longest, expected",
    [
        (1024, None, None, "blocks"),
        (1024, 40, 576, "blocks"),
        (1024, 20, 64, "unpack"),
        (64, 1, None, "xla"),
        (64, 20, 64, "xla"),  # bounds that say nothing
        (128, 1, 128, "xla"),
        (256, 1, 256, "unpack"),
        (256, 2, 256, "blocks"),
        (1024, 1, 1024, "blocks"),
    ],
)
def test_rows_and_bounds_choose(tokens, segments, longest, expected):
    assert choice_on_cpu(tokens, segments, longest) == expected
