import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from navit.model.heads import MapHead, max_pool, mean_pool, membership
from navit.sharding import Rules

SLOTS = 4
SEGMENTS = np.zeros((2, 30), np.int32)
SEGMENTS[0, :12], SEGMENTS[0, 12:13], SEGMENTS[0, 13:25] = 1, 2, 4
SEGMENTS[1, 3:20] = 2
MEMBER = membership(jnp.asarray(SEGMENTS), SLOTS)


def map_head(rng):
    head = MapHead(
        8, 12, 2, use_bias=True, dtype=jnp.float32, rules=Rules(), rngs=nnx.Rngs(0)
    )
    return jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype("f") * 0.1, head)


def pools(rng):
    return {"map": map_head(rng), "mean": mean_pool, "max": max_pool}


def alone(pool, x):
    """Pools one image's tokens `[tokens, d]` as a row of their own."""
    return pool(jnp.asarray(x)[None], jnp.ones((1, len(x), 1)))[0, 0]


@pytest.mark.parametrize("kind", ["map", "mean", "max"])
def test_equals_pooling_each_image_alone(kind, rng):
    pool = pools(rng)[kind]
    x = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32)
    found = pool(x, MEMBER)
    assert found.shape == (2, SLOTS, 8)
    for b, s in [(0, 1), (0, 2), (0, 4), (1, 2)]:
        expected = alone(pool, x[b, SEGMENTS[b] == s])
        np.testing.assert_allclose(found[b, s - 1], expected, atol=1e-5)


def test_mean_and_max_are_numpys(rng):
    x = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32)
    own = np.asarray(x)[0, SEGMENTS[0] == 4]
    np.testing.assert_allclose(mean_pool(x, MEMBER)[0, 3], own.mean(0), atol=1e-6)
    np.testing.assert_array_equal(max_pool(x, MEMBER)[0, 3], own.max(0))
    assert (np.asarray(mean_pool(x, MEMBER)[1, 3]) == 0).all()
    assert (np.asarray(max_pool(x, MEMBER)[1, 3]) == 0).all()


def test_map_is_a_softmax_of_the_probe(rng):
    """Against the formula written out in numpy for one image."""
    head = map_head(rng)
    x = jnp.asarray(rng.normal(size=(1, 9, 8)), jnp.float32)
    q = np.asarray(head.query(head.probe[...])).reshape(2, 4)
    k = np.asarray(head.key(x))[0].reshape(9, 2, 4)
    v = np.asarray(head.value(x))[0].reshape(9, 2, 4)
    logits = np.einsum("hk,nhk->nh", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(0)
    pooled = head.out(jnp.einsum("nh,nhk->hk", weights, v).reshape(1, 8))
    expected = head.mlp(head.norm, pooled[None])[0, 0]
    found = head(x, jnp.ones((1, 9, 1)))[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = head.weights(x, jnp.ones((1, 9, 1)))[0]
    np.testing.assert_allclose(found, weights, atol=1e-6)


@pytest.mark.parametrize("kind", ["map", "mean", "max"])
def test_no_leak_in_value_or_gradient(kind, rng):
    pool = pools(rng)[kind]
    x = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32)
    outside = (SEGMENTS != 4)[..., None]
    poisoned = jnp.where(outside, x * 300 - 40, x)
    pooled = jax.jit(lambda x: pool(x, MEMBER)[0, 3])
    np.testing.assert_array_equal(pooled(x), pooled(poisoned))
    gradient = np.asarray(jax.grad(lambda x: (pooled(x) ** 2).sum())(x))
    assert (gradient[np.broadcast_to(outside, gradient.shape)] == 0).all()
    assert np.abs(gradient[0, 13:25]).max() > 0


def test_large_logits_of_one_image_do_not_drown_another(rng):
    """The softmax is stabilised per image: a shared maximum would underflow."""
    head = map_head(rng)
    x = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32)
    x = x.at[0, :12].multiply(1e4)
    found = head(x, MEMBER)[0, 3]
    np.testing.assert_allclose(found, alone(head, x[0, 13:25]), atol=1e-5)
    gradient = jax.grad(lambda x: head(x, MEMBER).sum())(x)
    assert np.isfinite(gradient).all()


def test_tied_maxima_share_the_gradient():
    x = jnp.array([[[1.0], [3.0], [3.0], [2.0]]])
    gradient = jax.grad(lambda x: max_pool(x, jnp.ones((1, 4, 1))).sum())(x)
    np.testing.assert_allclose(gradient[0, :, 0], [0, 0.5, 0.5, 0])


@pytest.mark.parametrize("kind", ["map", "mean", "max"])
def test_cost_is_linear_in_the_row(kind, rng):
    """A row twice as long with as many slots: twice the FLOPs the compiler counts."""
    pool = pools(rng)[kind]

    def flops(n):
        x, member = jnp.zeros((1, n, 8)), jnp.zeros((1, n, SLOTS))
        return jax.jit(pool).lower(x, member).compile().cost_analysis()["flops"]

    assert flops(2048) < 2.1 * flops(1024)
