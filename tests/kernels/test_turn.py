"""The kernel that turns queries and keys, in Pallas' simulation of a TPU on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from navit.kernels.turn import tables, takes, turn
from navit.model import rotary


# Heads along sublanes, and along lanes: in pairs, and alone.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads, width", [(4, 24), (2, 64), (1, 128)])
def test_the_kernel_turns_as_the_formula(heads, width, dtype, rng):
    assert takes(128, heads, width)
    shape = (2, 128, 3 * heads * width)
    qkv = jnp.asarray(rng.normal(size=shape), dtype)
    above = jnp.asarray(rng.normal(size=shape), dtype)
    angles = jnp.asarray(rng.normal(size=(2, 128, width // 2)), jnp.float32)
    own = tables(jnp.cos(angles), jnp.sin(angles), heads)

    def with_gradient(f):
        y, back = jax.vjp(f, qkv)
        return y, *back(above)

    found = with_gradient(lambda x: turn(x, own, width, pltpu.InterpretParams()))
    expected = with_gradient(lambda x: rotary.rotate(x, angles, width))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_array_equal(
        found[0][..., 2 * heads * width :], qkv[..., 2 * heads * width :]
    )


def test_rows_and_heads_that_are_not_whole_tiles():
    assert not takes(100, 2, 64) and not takes(128, 1, 72) and not takes(128, 3, 20)


def test_without_the_kernel_a_tpu_says_so(monkeypatch, caplog):
    monkeypatch.setattr(rotary, "platform", lambda: "tpu")
    coords = jnp.zeros((1, 100, 2), jnp.int32)
    config = rotary.RotaryConfig()
    turned = rotary.rotation(config, coords, coords + 1, 64, kernel_heads=2)
    assert turned.tables is None and "rows of 100 tokens" in caplog.text
    coords = jnp.zeros((1, 128, 2), jnp.int32)
    turned = rotary.rotation(config, coords, coords + 1, 64, kernel_heads=2)
    assert turned.tables is not None
