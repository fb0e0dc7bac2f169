import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tiny_config

from navit.config import OptimConfig
from navit.model.two_tower import TwoTower
from navit.optim import make_optimizer, make_schedule


def test_schedule_warms_up_and_ends_at_zero():
    schedule = make_schedule(OptimConfig(lr=0.1, warmup_steps=10), 110)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(5), 0.05, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), 0.05, rtol=1e-5)
    np.testing.assert_allclose(schedule(110), 0, atol=1e-8)


def test_warmup_longer_than_the_run_still_runs():
    schedule = make_schedule(OptimConfig(lr=0.1, warmup_steps=100), 4)
    assert np.isfinite([float(schedule(i)) for i in range(5)]).all()


def test_decay_spares_norms_biases_and_scalars():
    """With zero gradients only weight decay moves a parameter."""
    model = TwoTower(tiny_config().model, rngs=nnx.Rngs(0))
    model = jax.tree.map(lambda p: p + 1.0, model)
    optimizer = make_optimizer(OptimConfig(lr=1.0, warmup_steps=0, weight_decay=0.1), 9)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model
    )
    moved = optax.apply_updates(model, updates)
    before = dict(jax.tree_util.tree_flatten_with_path(model)[0])
    for path, after in jax.tree_util.tree_flatten_with_path(moved)[0]:
        name = jax.tree_util.keystr(path)
        spared = ".bias" in name or ".scale" in name
        same = np.array_equal(after, before[path])
        assert same == spared, name


def test_gradients_are_clipped_to_the_global_norm():
    optimizer = make_optimizer(OptimConfig(clip_norm=1.0), 10)
    params = {"kernel": jnp.zeros(4)}
    state = optimizer.init(params)
    _, small = optimizer.update({"kernel": jnp.full(4, 0.5)}, state, params)
    _, large = optimizer.update({"kernel": jnp.full(4, 500.0)}, state, params)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_a_frozen_tower_has_no_moments_no_update_and_no_decay(frozen):
    model = TwoTower(tiny_config().model, rngs=nnx.Rngs(0))
    config = OptimConfig(lr=1.0, warmup_steps=0, weight_decay=0.1)
    config = dataclasses.replace(config, **{f"{frozen}_lr": 0.0})
    optimizer = make_optimizer(config, 9)
    state = optimizer.init(model)

    def size(tree):
        return sum(x.size for x in jax.tree.leaves(tree) if x.ndim)

    assert size(state) == 2 * (size(model) - size(getattr(model, frozen)))
    gradients = jax.tree.map(jnp.ones_like, model)
    updates, after = optimizer.update(gradients, state, model)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for tower in ("vision", "text"):
        moved = [bool(x.any()) for x in jax.tree.leaves(getattr(updates, tower))]
        assert all(moved) if tower != frozen else not any(moved)
