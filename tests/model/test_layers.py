import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from navit.model.layers import layer_norm


@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm_equals_flax_in_value_and_gradient(use_bias, rng):
    ours = layer_norm(24, use_bias=use_bias, dtype=jnp.float32, rngs=nnx.Rngs(0))
    theirs = nnx.LayerNorm(
        24, epsilon=ours.epsilon, use_bias=use_bias, rngs=nnx.Rngs(0)
    )
    for norm in (ours, theirs):
        values = np.random.default_rng(1)
        norm.scale[...] = jnp.asarray(values.normal(size=24), jnp.float32)
        if use_bias:
            norm.bias[...] = jnp.asarray(values.normal(size=24), jnp.float32)
    x, weight = rng.normal(1, 2, size=(2, 3, 5, 24)).astype(np.float32)
    x[0, 0] = 0  # as at padding

    def results(norm):
        def loss(norm, x):
            return (norm(x) * weight).sum()

        return jax.value_and_grad(loss, (0, 1))(norm, jnp.asarray(x))

    found, expected = map(jax.tree.leaves, (results(ours), results(theirs)))
    assert len(found) == len(expected) == 3 + use_bias
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
