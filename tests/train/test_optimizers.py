"""Optimizers besides AdamW, schedules besides the cosine, and layer-wise decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tiny_config

from navit.config import OptimConfig, override
from navit.convert.stored import name_of
from navit.model.two_tower import TwoTower
from navit.sharding import make_mesh, use_mesh
from navit.train.checkpoint import Checkpoints
from navit.train.optim import make_optimizer, make_schedule
from navit.train.state import TrainState, init_state

NAMES = ("adamw", "adafactor", "muon", "lion")
WIDE = [
    "model.vision.width=32",
    "model.vision.mlp_dim=64",
    "model.text.width=32",
    "optim.warmup_steps=0",
    "optim.schedule=constant",
]


@functools.cache
def stepped(steps, *options):
    """The parameters before and after steps, and the state; gradients are made up."""
    config = override(tiny_config(), [*WIDE, *options])
    optimizer = make_optimizer(config.optim, 9)

    @jax.jit
    def update(model, state, step):
        gradients = jax.tree.map(lambda p: jnp.sin(300 * p + 1 + step), model)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state

    first = model = initial_model(config.model)
    state = jax.tree.map(jnp.copy, jax.jit(optimizer.init)(model))
    for step in range(steps):
        model, state = update(model, state, jnp.float32(step))
    return by_name(first), by_name(model), state


@functools.cache
def initial_model(model):
    return jax.jit(lambda: TwoTower(model, rngs=nnx.Rngs(0)))()


def by_name(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): np.asarray(x) for path, x in leaves}


def moved(*options):
    before, after, _ = stepped(1, *options)
    return {name: after[name] - before[name] for name in before}


def spec_of(x):
    """The mesh axes of each array axis; without a sharding, none."""
    return [None] * x.ndim if x.sharding is None else [*x.sharding.spec]


@pytest.mark.parametrize("name", NAMES)
def test_on_a_mesh_an_update_keeps_every_sharding(name):
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", f"optim.name={name}"]
    config = override(tiny_config(), [*WIDE, *mesh])
    devices, rules = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optim, 9)
    with use_mesh(devices):
        state = jax.eval_shape(lambda: init_state(config, optimizer, rules))
        model, before = state.model, state.opt_state
        after = jax.eval_shape(optimizer.update, model, before, model)
    for a, b in zip(*map(jax.tree.leaves, ((model, before), after)), strict=True):
        assert (a.shape, a.dtype, spec_of(a)) == (b.shape, b.dtype, spec_of(b))
    assert any(any(spec_of(x)) for x in jax.tree.leaves(before))


def test_muon_orthogonalizes_inner_kernels_and_adam_does_the_rest():
    options = ["optim.weight_decay=0", "optim.lr=0.01"]
    muon, adam = moved("optim.name=muon", *options), moved(*options)
    seen = 0
    for name, update in muon.items():
        inside = ".blocks." in name or name.startswith("vision.head.")
        if not (inside and name.endswith(".kernel")):
            np.testing.assert_allclose(update, adam[name], atol=1e-7, err_msg=name)
            continue
        seen += 1
        for matrix in update.reshape(-1, *update.shape[-2:]):
            # Newton-Schulz leaves singular values within about 0.3 of 1.
            sizes = np.linalg.svd(matrix / 0.01, compute_uv=False)
            sizes /= 0.2 * max(matrix.shape) ** 0.5
            assert 0.5 < np.median(sizes) < 1.3 and sizes.max() < 1.35, name
    assert seen == 18


def test_lion_moves_every_number_by_the_learning_rate():
    for name, update in moved("optim.name=lion", "optim.weight_decay=0").items():
        np.testing.assert_allclose(np.abs(update), 1e-3, rtol=1e-2, err_msg=name)


def test_adafactor_equals_its_paper_with_big_visions_settings():
    """Rows and columns of the squares (arXiv 1804.04235, algorithm 4), in numpy."""
    config = OptimConfig(
        lr=0.1,
        warmup_steps=0,
        schedule="constant",
        name="adafactor",
        clip_norm=1e9,
        b2=0.6,
    )
    optimizer = make_optimizer(config, 9)
    rng = np.random.default_rng(0)
    params = {"wide": jnp.zeros((40, 64)), "thin": jnp.zeros((64, 3))}
    state = optimizer.init(params)
    row = col = square = 0.0
    mean = {name: np.zeros(x.shape) for name, x in params.items()}
    for step in range(4):
        g = {name: rng.standard_normal(x.shape) for name, x in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        keep = min(0.6, 1 - (step + 1) ** -0.8)
        row = keep * row + (1 - keep) * (g["wide"] ** 2).mean(1)
        col = keep * col + (1 - keep) * (g["wide"] ** 2).mean(0)
        square = keep * square + (1 - keep) * g["thin"] ** 2
        scaled = {
            "wide": g["wide"] / np.sqrt(np.outer(row, col) / row.mean()),
            "thin": g["thin"] / np.sqrt(square),
        }
        for name, x in scaled.items():
            mean[name] = 0.9 * mean[name] + 0.1 * x
            # The first moment is kept in bfloat16.
            np.testing.assert_allclose(updates[name], -0.1 * mean[name], atol=2e-3)
    sizes = [x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    assert sum(sizes) < 64 * 3 + 40 + 64 + 10


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_state_is_restored_to_the_bit(name, tmp_path):
    options = [f"optim.name={name}", "optim.ema=0.9", "train.on_nonfinite=skip:5"]
    config = override(tiny_config(), [*WIDE, *options])
    model, opt_state = initial_model(config.model), stepped(1, options[0])[2]
    average = jax.tree.map(lambda p: p + 1, model)
    state = TrainState(jnp.int32(3), model, opt_state, jnp.int32(2), average)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, config, "data")
    checkpoints.close()
    found = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_frozen_tower_has_no_state(name):
    config = override(tiny_config(), [f"optim.name={name}", "optim.text_lr=0"])
    optimizer = make_optimizer(config.optim, 9)
    model = initial_model(config.model)
    state = jax.eval_shape(optimizer.init, model)
    names = [x for x, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert names and not any(".text." in jax.tree_util.keystr(x) for x in names)
    _, after = jax.eval_shape(optimizer.update, model, state, model)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_layers_learn_at_timms_factors():
    """The image tower has two blocks, the text tower one."""
    whole = moved("optim.weight_decay=0")
    decayed = moved("optim.weight_decay=0", "optim.layer_decay=0.5")
    factors = {
        "vision.patch.kernel": 0.125,
        "vision.position.table": 0.125,
        "vision.encoder.blocks.mlp.up.kernel": (0.25, 0.5),
        "vision.encoder.blocks.attention_norm.bias": (0.25, 0.5),
        "vision.encoder.norm.scale": 0.5,
        "vision.head.probe": 1,
        "vision.head.mlp.up.kernel": 1,
        "text.embedding": 0.25,
        "text.position": 0.25,
        "text.encoder.blocks.mlp.up.kernel": 0.5,
        "text.encoder.norm.bias": 0.5,
        "text.head.kernel": 1,
        "scale": 1,
        "bias": 1,
    }
    for name, factor in factors.items():
        expected = whole[name].T * np.array(factor)
        np.testing.assert_allclose(
            decayed[name].T, expected, atol=2e-6, rtol=1e-2, err_msg=name
        )


@pytest.mark.parametrize("schedule", ["rsqrt", "wsd", "constant"])
def test_schedules(schedule):
    config = OptimConfig(lr=0.1, warmup_steps=10, schedule=schedule, timescale=50)
    rate = make_schedule(config, 200)
    plateau = {
        step: 0.1 / (1 + (step - 10) / 50) ** 0.5 if schedule == "rsqrt" else 0.1
        for step in (10, 100, 160, 180)
    }
    expected = {0: 0.0, 5: 0.05, **plateau}
    if schedule != "constant":  # a fifth of 200 steps cools down
        expected |= {180: plateau[180] / 2, 200: 0.0}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(jax.jit(rate)(step), value, rtol=1e-5, atol=1e-9)


def test_the_end_of_a_schedule_is_that_of_the_whole():
    options = dict(lr=0.1, warmup_steps=10, schedule="wsd", cooldown_steps=30)
    whole = make_schedule(OptimConfig(**options), 200)
    end = make_schedule(OptimConfig(**options, start=0.9), 20)
    assert float(end(0)) < 0.1
    for step in range(21):
        np.testing.assert_allclose(end(step), whole(180 + step), rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["optim.name=adam"], "adamw, adafactor, muon, lion"),
        (["optim.schedule=linear"], "cosine, rsqrt, wsd, constant"),
        (["optim.cooldown_steps=9"], "schedule=cosine has no cool-down"),
        (["optim.schedule=wsd", "optim.cooldown_steps=-1"], "must be 0 or more"),
        (["optim.timescale=0"], "timescale must be positive"),
        (["optim.ema=1"], "such as 0.9999"),
        (["optim.layer_decay=0"], "layer_decay must be a factor above 0"),
        (["train.on_nonfinite=skip"], "stop or skip:N"),
        (["train.on_nonfinite=skip:0"], "stop or skip:N"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        override(tiny_config(), options)
