"""The TPU attention kernels, in Pallas' simulation of a TPU on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from navit.kernels.splash import _attend_forward, _blocks, splash, splash_skip
from navit.kernels.splash_blocks import spread, visited
from navit.model.attention import attention, attention_qkvpacked, choice

SIMULATED = dict(interpret=pltpu.InterpretParams())


def separate(kernel, **options):
    """The kernel as a function of three arrays."""

    def attend(q, k, v, segment_ids):
        qkv = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (q, k, v)], -1)
        width = dict(width=q.shape[-1])
        return kernel(qkv, segment_ids, **width, **options).reshape(q.shape)

    return attend


KERNELS = {
    "splash": separate(splash, **SIMULATED),
    "splash_skip": separate(splash_skip, queries=128, keys=128, **SIMULATED),
}


def row_of(*lengths, tokens=256):
    """Segments 1, 2, ... of these lengths, one after another, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, tokens - len(ids)))


def arrays(rng, rows, heads, width, dtype=jnp.float32):
    segments = jnp.asarray(np.stack(rows), jnp.int32)
    shape = (4, *segments.shape, heads, width)
    q, k, v, weight = jnp.asarray(rng.normal(size=shape), dtype)
    return q, k, v, segments, weight * (segments > 0)[..., None, None]


def with_gradients(attend, q, k, v, segments, weight):
    def total(q, k, v):
        out = attend(q, k, v, segments)
        return (out * weight).sum(), out

    total = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(total)(q, k, v)
    return out, gradients


def assert_equals_the_dense_mask(attend, args):
    """In value and all three gradients; outputs at padding are finite."""
    out, gradients = with_gradients(attend, *args)
    dense = functools.partial(attention, implementation="xla")
    expected, of_dense = with_gradients(dense, *args)
    real = np.asarray(args[3]) > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)
    assert np.isfinite(out).all()
    for found, dense in zip(gradients, of_dense, strict=True):
        np.testing.assert_allclose(found, dense, atol=4e-6)


# Padding at the end, nowhere, everywhere, and between segments; two, four or one head
# to fill the lanes, and heads of 72, of which it takes sixteen.
CASES = {
    "heads of 64": (2, 64, [row_of(100, 120), row_of(256), row_of()]),
    "heads of 96": (4, 96, [row_of(1, 254)]),
    "heads of 72": (2, 72, [row_of(20, 130, 90)]),
    "any order": (1, 128, [np.repeat([3, 0, 1, 0, 3, 2, 0, 9], 32)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_dense_mask_in_value_and_gradients(kernel, case, rng):
    heads, width, rows = CASES[case]
    assert_equals_the_dense_mask(KERNELS[kernel], arrays(rng, rows, heads, width))


@pytest.mark.parametrize(
    "tokens, blocks",
    [
        (512, dict(queries=256, keys=128)),
        (512, dict(queries=128, keys=256, chunk=128)),
        (768, dict(queries=384, keys=384)),
    ],
)
def test_block_sizes_do_not_matter(tokens, blocks, rng):
    args = arrays(rng, [row_of(100, 150, 200, tokens=tokens)], 2, 64)
    attend = separate(splash_skip, **blocks, **SIMULATED)
    assert_equals_the_dense_mask(attend, args)


@pytest.mark.parametrize("tokens", [640, 768])
def test_a_row_may_be_split_into_equal_or_unequal_chunks(tokens, rng):
    """Chunks of 512 and 128 queries, or two of 384."""
    args = arrays(rng, [row_of(100, 333, 150, tokens=tokens)], 4, 64)
    assert_equals_the_dense_mask(KERNELS["splash"], args)


# The second is near the largest float: its products are infinite or NaN.
POISONS = [lambda x: x * -7e3 + 11, lambda x: jnp.sign(x) * 3e38]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_leak_between_segments_in_value_or_gradient(kernel, rng):
    """Segment B keeps every bit, whatever A and padding hold, and without A."""
    q, k, v, segments, _ = arrays(rng, [row_of(100, 90)], 2, 64)
    outside = np.ones((1, 256, 1, 1), bool)
    outside[0, 100:190] = False

    def total(q, k, v, segments):
        out = KERNELS[kernel](q, k, v, segments)
        return (out[0, 100:190] ** 2).sum(), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, before), gradients = run(q, k, v, segments)
    for poisoned in POISONS:
        poison = (jnp.where(outside, poisoned(x), x) for x in (q, k, v))
        (_, after), _ = run(*poison, segments)
        np.testing.assert_array_equal(before[0, 100:190], after[0, 100:190])
    (_, removed), _ = run(q, k, v, jnp.where(segments == 1, 0, segments))
    np.testing.assert_array_equal(before[0, 100:190], removed[0, 100:190])
    for g in gradients:
        assert (np.asarray(g)[np.broadcast_to(outside, g.shape)] == 0).all()
        assert np.abs(g[0, 100:190]).max() > 0


def test_bfloat16_stays_close(rng):
    args = arrays(rng, [row_of(100, 120)], 2, 64, jnp.bfloat16)
    out, gradients = with_gradients(KERNELS["splash"], *args)
    dense = functools.partial(attention, implementation="xla")
    exact = [x.astype(jnp.float32) if x.ndim == 4 else x for x in args]
    expected, of_dense = with_gradients(dense, *exact)
    real = np.asarray(args[3]) > 0
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - np.asarray(expected)
    assert np.abs(error[real]).max() < 0.03
    for found, dense in zip(gradients, of_dense, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.abs(np.asarray(found, np.float32) - dense).max() < 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_gradients_are_not_biased(kernel, rng):
    """Rounding errors of many elements cancel, but not that of a common factor."""
    args = arrays(rng, [row_of(100, 156)], 4, 64, jnp.bfloat16)
    _, gradients = with_gradients(KERNELS[kernel], *args)
    dense = functools.partial(attention, implementation="xla")
    exact = [x.astype(jnp.float32) if x.ndim == 4 else x for x in args]
    _, of_dense = with_gradients(dense, *exact)
    for found, expected in zip(gradients, of_dense, strict=True):
        assert slope(found, expected) == pytest.approx(1, abs=2e-4)


def test_bfloat16_logits_are_not_biased(rng):
    """In a segment of one token, the logarithm of the softmax sum is the only logit."""
    q, k, v, segments, _ = arrays(rng, [np.arange(1, 257)], 4, 64, jnp.bfloat16)
    qkv = jnp.concatenate([x.reshape(1, 256, -1) for x in (q, k, v)], -1)
    blocks = _blocks(qkv, 64, **SIMULATED, queries=256, keys=256)
    _, (*_, statistics) = _attend_forward(qkv, spread(segments), blocks)
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    expected = (q * k).sum(-1) / math.sqrt(64) * math.log2(math.e)
    found = statistics.reshape(1, 4, 256).swapaxes(1, 2)
    assert slope(found, expected) == pytest.approx(1, abs=2e-4)


def slope(found, expected):
    """The slope of the best fitting line through 0."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return (found * expected).sum() / (expected**2).sum()


@pytest.mark.parametrize("n", [1024, 4096, 16384])
def test_blocks_visited_grow_with_the_sum_of_squares(n, rng):
    lengths = []
    while sum(lengths) < n - 500:
        lengths.append(int(rng.integers(64, 500)))
    ids = jnp.asarray(row_of(*lengths, tokens=n)[None])
    bounds = np.asarray(visited(ids, queries=128, keys=128))[0]
    needed = {
        (i // 128, j // 128)
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False)
        for i in range(start, start + length)
        for j in range(start, start + length, 32)
    }
    assert all(bounds[i, 0] <= j < bounds[i, 1] for i, j in needed)
    pairs = (bounds[:, 1] - bounds[:, 0]).sum()
    # Each block of queries may add one of keys at either end.
    assert pairs * 128**2 < 2.5 * sum(x**2 for x in lengths)


def test_blocks_of_padding_visit_nothing():
    ids = jnp.asarray(np.stack([row_of(100), row_of(), row_of(200)]))
    bounds = visited(ids, queries=128, keys=128)
    expected = [[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 2], [0, 2]]]
    np.testing.assert_array_equal(bounds, expected)


@pytest.mark.parametrize("kernel", [splash, splash_skip])
def test_remat_can_save_what_the_backward_pass_needs(kernel, capsys):
    x = jnp.zeros((1, 128, 2, 64))
    segments = jnp.ones((1, 128), jnp.int32)
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    def saved(policy):
        attend = jax.checkpoint(
            lambda q: separate(kernel)(q, q, q, segments), policy=policy
        )
        jax.ad_checkpoint.print_saved_residuals(attend, x)
        return capsys.readouterr().out.count("named 'attention'")

    assert saved(policy) == 2  # the values, and the logarithms of the sums
    assert saved(None) == 0


def test_errors_name_what_is_wrong():
    def call(kernel, n):
        x = jnp.zeros((1, n, 2, 64))
        kernel(x, x, x, jnp.ones((1, n), jnp.int32))

    with pytest.raises(ValueError, match="multiple of 128 tokens, not 200"):
        call(separate(splash), 200)
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 1100"):
        call(separate(splash_skip), 1100)
    with pytest.raises(ValueError, match=r'2048 tokens .* use "splash_skip"'):
        call(separate(splash), 2048)
    with pytest.raises(ValueError, match=r"'splash' is a TPU kernel, .* a cpu"):
        call(functools.partial(attention, implementation="splash"), 128)


@pytest.mark.parametrize(
    "platform, tokens, expected",
    [
        ("gpu", 1024, "xla"),
        ("tpu", 256, "splash"),
        ("tpu", 1024, "splash"),
        ("tpu", 2048, "splash_skip"),
        ("tpu", 729, "xla"),
    ],
)
def test_the_platform_and_the_row_choose(platform, tokens, expected):
    assert choice(platform, tokens, 768) == expected


@pytest.mark.parametrize("devices, kernel", [(8, True), (16, False)])
def test_the_heads_of_one_device_choose(devices, kernel):
    """16 heads of 72: two on each device fill a kernel's blocks, one does not."""
    mesh = jax.sharding.AbstractMesh(
        (1, devices),
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2,
        abstract_device=jax.sharding.AbstractDevice(
            device_kind="TPU v6 lite", num_cores=None, platform="tpu"
        ),
    )

    def array(shape, dtype, *spec):
        place = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    qkv = array((2, 256, 3 * 16 * 72), jnp.bfloat16, "data", None, "tensor")
    segments = array((2, 256), jnp.int32, "data")
    with jax.sharding.use_abstract_mesh(mesh):
        attend = functools.partial(attention_qkvpacked, width=72)
        program = jax.make_jaxpr(attend)(qkv, segments)
    assert ("splash_forward" in str(program)) == kernel
