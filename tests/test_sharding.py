import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from navit.config import Config, MeshConfig, Sigmoid, Softmax, override
from navit.input import pipeline
from navit.model.layers import add_bias
from navit.sharding import Rules, make_mesh, split_rows, use_mesh
from navit.train.optim import make_optimizer
from navit.train.state import init_state
from navit.train.step import make_train_step


@functools.cache  # several meshes are compared with the same run on one device
def run(config, steps=4):
    """Trains a few steps on the config's mesh; returns losses and parameters."""
    mesh, rules = make_mesh(config.mesh)
    source = pipeline.open_source(config.data.train)
    with use_mesh(mesh):
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = jax.jit(lambda: init_state(config, optimizer, rules))()
        step = make_train_step(config, optimizer, rules)
        losses = []
        for _, batch in zip(
            range(steps), pipeline.train_batches(config, source), strict=False
        ):
            state, metrics = step(state, split_rows(batch, rules))
            losses.append(float(metrics["loss"]))
        return losses, state


PRESETS = {
    "replicate": ["mesh.data=8"],
    "fsdp": ["mesh.data=1", "mesh.fsdp=8"],
    "replicate, fsdp": ["mesh.data=2", "mesh.fsdp=4"],
    "fsdp, tensor": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
}


def sharded_config() -> Config:
    """A width that 8 devices can share.

    There are so few images that some slots and some whole devices stay empty.
    """
    options = ["data.rows=8", "model.vision.width=32", "model.text.width=32"]
    config = tiny_config(losses=(Sigmoid(), Softmax(weight=0.5)))
    return override(config, [*options, "data.train.size=14"])


@pytest.mark.parametrize(
    "preset",
    [
        "replicate, fsdp",
        pytest.param("replicate", marks=pytest.mark.slow),
        pytest.param("fsdp", marks=pytest.mark.slow),
    ],
)
def test_one_device_equals_eight(preset):
    """Loss and parameters, with parameters replicated and sharded.

    `test_hosts` compares "fsdp, tensor" to one device, on 8 devices of two processes.
    """
    config = sharded_config()
    expected_losses, expected = run(config)
    losses, state = run(override(config, PRESETS[preset]))
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(state.model)[0],
        jax.tree.leaves(expected.model),
        strict=True,
    ):
        # A key's bias shifts all logits of a query equally, so its gradient is rounding
        # noise around an exact 0, which Adam turns into full steps.
        if ".key.bias" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    kernel = state.model.vision.encoder.blocks.mlp.up.kernel[...]
    assert len(kernel.sharding.device_set) == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_moments_are_sharded(preset):
    config = override(sharded_config(), PRESETS[preset])
    mesh, rules = make_mesh(config.mesh)
    with use_mesh(mesh):
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = jax.eval_shape(lambda: init_state(config, optimizer, rules))
    (kernel,) = jax.tree.leaves(state.model.vision.encoder.blocks.mlp.up.kernel)
    assert kernel.sharding.is_fully_replicated == (preset == "replicate")
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    sharded = [x for x in moments if not x.sharding.is_fully_replicated]
    assert bool(sharded) == (preset != "replicate")


def test_rules():
    assert Rules()("batch", None) is None
    assert Rules("data")("batch", None, "embed") == jax.P("data", None, None)
    assert Rules(("data", "fsdp"), "fsdp")("embed") == jax.P("fsdp")


def test_mesh_that_does_not_fit_is_an_error():
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match=r"mesh.data=3, mesh.fsdp=3, .* do not fit 8"):
        make_mesh(MeshConfig(data=3, fsdp=3))
    with pytest.raises(ValueError, match="fit 8 devices"):
        make_mesh(MeshConfig(data=-1, fsdp=16))
    with pytest.raises(ValueError, match=r"mesh.fsdp=3, .* do not fit 8"):
        make_mesh(MeshConfig(fsdp=3))
    mesh, _ = make_mesh(MeshConfig(data=2, fsdp=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
    mesh, _ = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    mesh, rules = make_mesh(MeshConfig(data=1, fsdp=1))
    assert mesh is None and rules == Rules()


def test_a_bias_may_be_split_over_sixteen_devices():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.sharding.AbstractMesh((1, 16), ("data", "tensor"), axis_types=explicit)

    def array(shape, *spec):
        place = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    y, bias = array((4, 32), "data", "tensor"), array((32,), "tensor")
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.grad(lambda *args: add_bias(*args).sum(), argnums=(0, 1))
        found = jax.eval_shape(gradients, y, bias)
    assert [x.sharding.spec for x in found] == [y.sharding.spec, bias.sharding.spec]


def test_planted_sharding_mistake_is_caught():
    """Explicit meshes refuse an ambiguous product instead of guessing communication."""
    mesh, rules = make_mesh(MeshConfig())
    with use_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, rules("batch")))
        with pytest.raises(Exception, match=r"[Ss]hard"):
            x @ x.T
