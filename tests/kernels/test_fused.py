"""The TPU kernels around attention, in Pallas' simulation of a TPU on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from navit.config import MeshConfig
from navit.kernels.fused import chunks, fits
from navit.kernels.fused_mlp import MlpWeights, fused_mlp
from navit.kernels.norm_project import ProjectWeights, norm_project
from navit.model import block as block_file
from navit.model import mlp as mlp_file
from navit.model.attention import attention_qkvpacked
from navit.sharding import Rules, make_mesh

SIMULATED = dict(interpret=pltpu.InterpretParams())
simulated = functools.partial(fused_mlp, **SIMULATED)


def norm(x, w):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * w.scale[None, None] + w.bias[
        None, None
    ]


def reference(x, w):
    x = x.astype(jnp.float32)
    y = norm(x, w) @ w.up.astype(jnp.float32) + w.up_bias[None, None]
    y = jax.nn.gelu(y, approximate=True)
    return x + y @ w.down.astype(jnp.float32) + w.down_bias[None, None]


def example(rng, width, hidden, dtype=jnp.float32, tokens=128):
    def normal(*shape, std=1.0):
        return jnp.asarray(rng.normal(scale=std, size=shape), jnp.float32)

    weights = MlpWeights(
        scale=1 + normal(width, std=0.2),
        bias=normal(width, std=0.2),
        up=normal(width, hidden, std=width**-0.5).astype(dtype),
        up_bias=normal(hidden),
        down=normal(hidden, width, std=hidden**-0.5).astype(dtype),
        down_bias=normal(width),
    )
    x, above = normal(2, 2, tokens, width).astype(dtype)
    return x, weights, above


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(f, x, weights, above):
    y, back = jax.vjp(f, x, weights)
    return y, *back(above.astype(y.dtype))


# Hidden channels in one step, in two, and in two with padding; tokens in two parts.
@pytest.mark.parametrize(
    "width, hidden, tokens",
    [(128, 512, 128), (256, 1024, 128), (128, 720, 128), (128, 256, 512)],
)
def test_equals_plain_jax_in_value_and_gradients(width, hidden, tokens, rng):
    args = example(rng, width, hidden, tokens=tokens)
    found, expected = with_gradients(simulated, *args), with_gradients(reference, *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "width, outputs, tokens",
    [(128, 384, 128), (256, 768, 128), (128, 256, 128), (128, 384, 512)],
)
def test_the_projection_equals_plain_jax_in_value_and_gradients(
    width, outputs, tokens, transposed, rng
):
    x, mlp, above = example(rng, width, outputs, tokens=tokens)
    weights = ProjectWeights(*mlp[:4])
    weight = jnp.asarray(rng.normal(size=(2, tokens, outputs)), jnp.float32)

    def plain(x, w):
        return norm(x, w) @ w.kernel + w.kernel_bias[None, None], x

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        y, back = jax.vjp(f, x, weights)
        return y, back((weight, above))

    kernel = functools.partial(norm_project, transposed=transposed, **SIMULATED)
    found, expected = run(kernel), run(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


def test_bfloat16_stays_close(rng):
    args = example(rng, 128, 512, jnp.bfloat16)
    found, expected = with_gradients(simulated, *args), with_gradients(reference, *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype or a.dtype == jnp.bfloat16
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


def test_tokens_do_not_see_each_other(rng):
    x, weights, _ = example(rng, 128, 512)
    changed = x.at[0, :50].set(-7e3)
    run = jax.jit(simulated)
    before, after = run(x, weights), run(changed, weights)
    np.testing.assert_array_equal(before[0, 50:], after[0, 50:])
    np.testing.assert_array_equal(before[1], after[1])


def two_devices():
    return make_mesh(MeshConfig(data=1, fsdp=2))


def test_many_devices_equal_one(rng):
    x, weights, above = example(rng, 128, 512)
    expected = with_gradients(simulated, x, weights, above)
    mesh, rules = two_devices()
    with jax.set_mesh(mesh):
        x, above = (jax.reshard(y, rules("batch")) for y in (x, above))
        weights = jax.reshard(weights, jax.P())

        def total(x, weights):
            # Like the layers.
            up, down = (rules.gather(w, w.dtype) for w in (weights.up, weights.down))
            weights = weights._replace(up=up, down=down)
            return (simulated(x, weights, axes=rules.batch_axes) * above).sum()

        dx, found = jax.jit(jax.grad(total, argnums=(0, 1)))(x, weights)
    for a, b in zip(
        jax.tree.leaves((dx, found)), jax.tree.leaves(expected[1:]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "hidden, padded, channels",
    [(3072, 3072, 512), (4304, 4352, 256), (4096, 4096, 512), (192, 256, 256)],
)
def test_hidden_channels_are_split_with_little_padding(hidden, padded, channels):
    assert chunks(hidden) == (padded, channels)


def test_kernels_run_only_on_tpus():
    assert not fits(jnp.zeros((2, 128, 128)), 512, ())


def test_the_projection_on_many_devices_equals_one(rng):
    x, mlp, _ = example(rng, 128, 384)
    weights = ProjectWeights(*mlp[:4])

    def total(x, weights, **options):
        y, x = norm_project(x, weights, transposed=True, **options, **SIMULATED)
        return (y**2).sum() + (x * 3).sum()

    expected = jax.jit(jax.grad(total, argnums=(0, 1)))(x, weights)
    mesh, rules = two_devices()
    with jax.set_mesh(mesh):

        def sharded(x, weights):
            kernel = rules.gather(weights.kernel, weights.kernel.dtype)
            weights = weights._replace(kernel=kernel)
            return total(x, weights, axes=rules.batch_axes)

        x, weights = jax.reshard(x, rules("batch")), jax.reshard(weights, jax.P())
        found = jax.jit(jax.grad(sharded, argnums=(0, 1)))(x, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_unsupported_shapes_are_an_error(rng):
    x, mlp, _ = example(rng, 128, 320)
    with pytest.raises(ValueError, match=r"no kernel for .* kernel \(128, 320\)"):
        norm_project(x, ProjectWeights(*mlp[:4]), **SIMULATED)
    with pytest.raises(ValueError, match=r"no kernel for x .* 320 hidden"):
        simulated(x[:, :100], mlp)


@pytest.mark.parametrize(
    "num_heads, use_bias, eps", [(2, True, 1e-6), (4, True, 1e-2), (2, False, 1e-6)]
)
def test_a_block_gives_the_same_results_with_kernels(
    num_heads, use_bias, eps, rng, monkeypatch
):
    """With `[b, n, c]` between the product and attention, and with `[b, c, n]`."""
    shared = dict(dtype=jnp.float32, rules=Rules(), rngs=nnx.Rngs(0), fused=True)
    options = block_file.BlockOptions(128, 512, num_heads, use_bias=use_bias, eps=eps)
    block = block_file.Block(options, **shared)
    x = jnp.asarray(rng.normal(size=(2, 128, 128)), jnp.float32)
    segments = jnp.repeat(jnp.asarray([[1, 2], [1, 0]]), 64, axis=1)

    def run():
        def total(block, x):
            attend = functools.partial(attention_qkvpacked, segment_ids=segments)
            return (block(x, attend) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(block, x)

    expected, called = run(), []
    for file in (block_file, mlp_file):
        monkeypatch.setattr(file, "fits", lambda *args: True)
    monkeypatch.setattr(block_file, "heads_fill_lanes", lambda *args: num_heads == 2)
    for file, kernel in ((mlp_file, fused_mlp), (block_file, norm_project)):

        def recorded(*args, kernel=kernel, **options):
            called.append(kernel)
            return kernel(*args, **options, **SIMULATED)

        monkeypatch.setattr(file, kernel.__name__, recorded)
    found = run()
    assert called == [norm_project, fused_mlp]
    for (path, b), a in zip(
        jax.tree_util.tree_flatten_with_path(expected)[0],
        jax.tree.leaves(found),
        strict=True,
    ):
        atol = 1e-5 * max(1, np.abs(b).max())
        if ".key.bias" in jax.tree_util.keystr(path):
            # Its exact gradient is 0: 256 terms that cancel, one a token. Each result
            # is off by up to epsilon times the sum of their sizes. The query's bias
            # sums 256 terms of the same size with random signs, so that its gradient
            # is smaller than that sum by about the square root of 256. (Against
            # float64, the kernels are no farther off than plain JAX.)
            query = np.abs(expected[1][0].attention.query.bias[...]).max()
            atol = np.finfo(np.float32).eps * math.sqrt(256) * query
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
