"""The GPU attention kernels, interpreted on a CPU and lowered for CUDA."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from navit.kernels import flash as module
from navit.kernels.flash import flash
from navit.model import attention as dispatch
from navit.model.attention import attention, choice, misfit

# Blocks that are smaller than the segments, and of different sizes.
SIZES = dict(queries=64, keys=32, backward=32)
BLOCKS_OF_32 = dict(queries=32, keys=32, backward=32)


def row_of(*lengths, tokens=192):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, tokens - len(ids)))


# Padding at the end, nowhere, everywhere; segments in any order, as windows are.
ROWS = np.stack(
    [
        row_of(50, 1, 70),
        row_of(192),
        row_of(),
        np.repeat([3, 0, 1, 0, 3, 2, 0, 9, 1, 1, 0, 4], 16),
    ]
).astype(np.int32)


def attend(q, k, v, ids, implementation="flash", **options):
    ids = jnp.asarray(ids)
    if implementation != "flash":
        return attention(q, k, v, ids, implementation=implementation)
    qkv = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (q, k, v)], -1)
    sizes = SIZES | options
    out = flash(qkv, ids, width=q.shape[-1], interpret=True, **sizes)
    return out.reshape(q.shape)


def results(function, q, k, v, weight):
    """The output and the gradients of three arrays."""

    @jax.jit
    def both(q, k, v, weight):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(weight.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in both(q, k, v, weight)]


def arrays(rng, heads, width, dtype=jnp.float32):
    q, k, v, weight = rng.normal(size=(4, *ROWS.shape, heads, width))
    weight *= (ROWS > 0)[..., None, None]
    return [jnp.asarray(x, dtype) for x in (q, k, v, weight)]


@pytest.mark.parametrize("heads, width", [(2, 64), (3, 72), (1, 8), (1, 24)])
def test_equals_the_dense_mask_in_value_and_gradients(heads, width, rng):
    """Also for heads whose width is not a power of two, and the last of them."""
    args = arrays(rng, heads, width)
    found = results(functools.partial(attend, ids=ROWS), *args)
    expected = results(functools.partial(attend, ids=ROWS, implementation="xla"), *args)
    real = ROWS > 0
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=2e-6)
    assert (found[0][~real] == 0).all()
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=4e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_stay_close(dtype, rng):
    args = arrays(rng, 1, 72, dtype)
    exact = [x.astype(jnp.float32) for x in args]
    found = results(functools.partial(attend, ids=ROWS), *args)
    expected = results(
        functools.partial(attend, ids=ROWS, implementation="xla"), *exact
    )
    real = ROWS > 0
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=0.03)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)
        # Rounding errors of many elements cancel, but not that of a common factor.
        assert (a * b).sum() / (b * b).sum() == pytest.approx(1, abs=1e-3)


# The second is near the largest float: its products are infinite or NaN.
POISONS = [lambda x: x * -7e3 + 11, lambda x: jnp.sign(x) * 3e38]


def test_no_leak_between_segments_in_value_or_gradient(rng):
    """A segment keeps every bit, whatever others and padding hold, and without them."""
    q, k, v, weight = arrays(rng, 2, 24)

    @jax.jit
    def both(q, k, v, ids, weight):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, *back(weight)

    for segment in (1, 3):
        own = segment == ROWS
        outside = ~own[..., None, None]
        weighted = jnp.where(outside, 0, weight)
        before = [np.asarray(x) for x in both(q, k, v, ROWS, weighted)]
        for gradient in before[1:]:
            assert (gradient[~own] == 0).all() and np.abs(gradient[own]).max() > 0
        changed = [[jnp.where(outside, p(x), x) for x in (q, k, v)] for p in POISONS]
        runs = [both(*x, ROWS, weighted) for x in changed]
        runs.append(both(q, k, v, ROWS * own, weighted))
        for run in runs:
            for a, b in zip(before, run, strict=True):
                np.testing.assert_array_equal(a[own], np.asarray(b)[own])


def test_padding_has_no_gradient_whatever_it_holds():
    """Also if the passes visit different blocks, as for segments in several parts.

    The first and third block of 32 tokens share segment 3, so they visit the second
    too. That one visits only itself, and its softmax sums lack the large logits that
    its padding has with the first block's.
    """
    ids = np.repeat([3, 0, 0, 9, 3, 3, 5, 5], 16)[None]
    qkv = np.full((1, 128, 3 * 16), 0.1, np.float32)
    qkv[:, 32:48, :16], qkv[:, 16:32, 16:32], qkv[:, 32:48, 16:32] = 30, 30, -30
    _, back = jax.vjp(
        lambda x: flash(x, jnp.asarray(ids), width=16, interpret=True, **BLOCKS_OF_32),
        jnp.asarray(qkv),
    )
    (found,) = back(jnp.asarray(ids > 0, jnp.float32)[..., None].repeat(16, -1))
    assert np.isfinite(found).all()
    assert (found[ids == 0] == 0).all() and np.abs(found[ids > 0]).max() > 0


@pytest.mark.parametrize("tokens", [48, 41])
def test_rows_of_any_length(tokens, rng):
    """In blocks of 16 tokens, after padding to a multiple of them."""
    ids = jnp.asarray(row_of(20, 9, tokens=tokens)[None], jnp.int32)
    qkv = jnp.asarray(rng.normal(size=(1, tokens, 3 * 16)), jnp.float32)
    weight = jnp.asarray(ids > 0, jnp.float32)[..., None].repeat(16, -1)

    @functools.partial(jax.jit, static_argnums=0)
    def both(attend, qkv):
        out, back = jax.vjp(lambda x: attend(x, ids, width=16), qkv)
        return out * weight, *back(weight)

    found = both(functools.partial(flash, interpret=True), qkv)
    dense = functools.partial(dispatch.attention_qkvpacked, implementation="xla")
    for a, b in zip(found, both(dense, qkv), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-6)
    with pytest.raises(ValueError, match=r"48 channels are not .* heads of 7"):
        flash(qkv, ids, width=7)


def test_only_blocks_with_a_common_segment_are_visited(monkeypatch):
    """Four segments in a row: a quarter of the pairs, in either pass."""
    bounds = []

    def seen(kernel, **options):
        def call(first, *args):
            bounds.append(np.asarray(first))
            return [jnp.zeros(x.shape, x.dtype) for x in options["out_shape"]]

        return call

    monkeypatch.setattr(pl, "pallas_call", seen)
    ids = jnp.asarray(row_of(64, 64, 64, 64, tokens=256)[None])
    qkv = jnp.zeros((1, 256, 3 * 16))
    _, back = jax.vjp(lambda x: flash(x, ids, width=16, interpret=True, **SIZES), qkv)
    back(jnp.zeros((1, 256, 16)))
    for each, visited in zip(bounds, (2, 2), strict=True):
        assert (each[..., 1] - each[..., 0] == visited).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("heads, width", [(12, 64), (16, 72)])
def test_lowers_for_cuda_in_both_passes(heads, width, dtype):
    qkv = jax.ShapeDtypeStruct((2, 1152, 3 * heads * width), dtype)
    ids = jax.ShapeDtypeStruct((2, 1152), jnp.int32)

    def total(qkv, ids):
        return flash(qkv, ids, width=width).astype(jnp.float32).sum()

    kind = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        traced = jax.jit(jax.value_and_grad(total)).trace(qkv, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("flash_forward") and text.count("flash_backward")


def test_gpus_that_cannot_run_it_take_the_dense_mask(monkeypatch):
    """By their compute capability, if it is the default; otherwise with an error."""
    for capability, fits in ((7.5, False), (8.0, True), (12.0, True), (None, True)):
        monkeypatch.setattr(dispatch, "compute_capability", lambda c=capability: c)
        monkeypatch.setattr(dispatch, "ON_GPU", "flash")
        assert choice("gpu", 1024, 768) == ("flash" if fits else "xla")
        assert (misfit("flash", 1024, 768, "gpu") is None) == fits
    monkeypatch.setattr(module, "triton", None)
    assert "Triton backend" in misfit("flash", 1024, 768, "gpu")
