import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tiny_config

from navit.config import OptimConfig
from navit.convert import tensors
from navit.convert.stored import name_of
from navit.model.two_tower import TwoTower
from navit.train.optim import make_optimizer, make_schedule


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


def by_name(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): np.asarray(x, np.float64) for path, x in leaves}


def test_steps_equal_big_vision():
    """Its chain in numpy: clip, Adam, lr, lr_mults, wd on kernels, schedule, -1."""
    model = TwoTower(tiny_config().model, rngs=nnx.Rngs(0))
    model = jax.tree.map(lambda p: p + 0.5, model)
    config = OptimConfig(
        lr=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=2.0, text_lr=0.25
    )
    steps, b1, b2 = 6, config.b1, config.b2
    optimizer = make_optimizer(config, steps)
    state = optimizer.init(model)
    table = tensors.big_vision(
        tiny_config().model, scanned_vision=True, scanned_text=True
    )
    theirs = {ours: tensor.name for tensor in table for ours in tensor.ours}
    expected = by_name(model)
    assert theirs.keys() == expected.keys()
    m, v = ({k: 0 * x for k, x in expected.items()} for _ in range(2))
    for step in range(4):
        key = jax.random.key(step)
        gradients = jax.tree.map(lambda p, k=key: jax.random.normal(k, p.shape), model)
        updates, state = optimizer.update(gradients, state, model)
        model = optax.apply_updates(model, updates)
        gradients = by_name(gradients)
        norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
        cosine = 0.5 * (1 + np.cos(np.pi * (step - 2) / (steps - 2)))
        schedule = step / 2 if step < 2 else cosine
        found = by_name(model)
        for name, p in expected.items():
            g = gradients[name] * min(1, 2.0 / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            t = step + 1
            u = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + 1e-8)
            u = u * 0.01 * (0.25 if theirs[name].startswith("params/txt/") else 1)
            if theirs[name].endswith("/kernel"):
                u = u + 0.1 * p
            expected[name] = p - u * schedule
            np.testing.assert_allclose(
                found[name], expected[name], rtol=2e-6, atol=2e-7, err_msg=name
            )


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
