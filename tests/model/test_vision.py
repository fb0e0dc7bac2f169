"""The proofs that packing changes nothing: neighbours leave no trace in an image."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    PATCH,
    POSITIONS,
    make_vision,
    pack_grids,
    random_patches,
    vision_config,
)

from navit.batch import PackedImages
from navit.config import ModelConfig, PositionConfig
from navit.model.vision import Vision

GRIDS = [(3, 4), (1, 9), (5, 2), (1, 1), (4, 4)]
LONGEST = 16


@functools.cache
def compiled(implementation, pool="map", position=POSITIONS[0], **config):
    model = ModelConfig(
        vision=vision_config(pool=pool, position=position, **config),
        text=None,
        attention=implementation,
    )
    vision = make_vision(model)
    return jax.jit(lambda packed: vision(packed, max_image_tokens=LONGEST))


def image_tokens(out, packed, row, slot):
    return np.asarray(out.tokens)[row, np.asarray(packed.segment_ids)[row] == slot + 1]


CASES = list(itertools.product(["xla", "unpack"], ["map", "mean", "max", "none"]))


@pytest.mark.parametrize("implementation, pool", CASES)
def test_leak_proof(implementation, pool, rng):
    """Change or delete image A: image B is bit-equal, and d(B)/d(A) is exactly 0."""
    encode = compiled(implementation, pool)
    patches = random_patches(rng, GRIDS)
    row = {0: (0, GRIDS[0]), 1: (1, GRIDS[1]), 2: (2, GRIDS[2])}
    packed = pack_grids([row], 40, 4, patches)
    before = encode(packed)

    changed = packed._replace(patches=packed.patches.copy())
    changed.patches[0, :12] = 255 - changed.patches[0, :12]
    deleted = PackedImages(*(x.copy() for x in packed))
    deleted.patches[0, :12], deleted.segment_ids[0, :12] = 0, 0
    deleted.coords[0, :12], deleted.grids[0, 0] = 0, 0
    for other in (changed, deleted):
        after = encode(other)
        for slot in (1, 2):
            np.testing.assert_array_equal(
                image_tokens(before, packed, 0, slot),
                image_tokens(after, packed, 0, slot),
            )
            if pool != "none":
                np.testing.assert_array_equal(
                    before.pooled[0, slot], after.pooled[0, slot]
                )
    own = image_tokens(encode(changed), packed, 0, 0)
    assert np.abs(own - image_tokens(before, packed, 0, 0)).max() > 1e-3

    normalized = packed.patches.astype(np.float32) / 127.5 - 1

    def total(patches):
        out = encode(packed._replace(patches=patches))
        second = out.tokens[0, 12:21] if pool == "none" else out.pooled[0, 1]
        return (second**2).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(normalized)))[0]
    assert (gradient[:12] == 0).all() and (gradient[21:] == 0).all()
    assert np.abs(gradient[12:21]).max() > 0


@pytest.mark.parametrize("implementation, pool", CASES)
def test_padding_can_hold_anything(implementation, pool, rng):
    """Garbage patches and coords in padding change no bit anywhere."""
    encode = compiled(implementation, pool)
    patches = random_patches(rng, GRIDS)
    packed = pack_grids([{0: (0, GRIDS[0]), 2: (1, GRIDS[1])}], 40, 4, patches)
    normalized = packed._replace(
        patches=np.where(
            (packed.segment_ids > 0)[..., None],
            packed.patches.astype(np.float32) / 127.5 - 1,
            0,
        ).astype(np.float32)
    )
    pad = packed.segment_ids == 0
    for value in (0.5, -3e38, 3e38, np.inf):
        poisoned = PackedImages(*(x.copy() for x in normalized))
        poisoned.patches[pad] = value
        poisoned.coords[pad] = rng.integers(-(2**31), 2**31 - 1, (pad.sum(), 2))
        before, after = encode(normalized), encode(poisoned)
        np.testing.assert_array_equal(before.tokens, after.tokens)
        if pool != "none":
            np.testing.assert_array_equal(before.pooled, after.pooled)
            assert (np.asarray(after.pooled)[0, [1, 3]] == 0).all()


@pytest.mark.parametrize("position", POSITIONS, ids=str)
def test_packed_equals_alone(position, rng):
    """Any image, in any slot and row, with any neighbours, for all positions."""
    # The simplest head for all position embeddings but one compiles twice as fast.
    pool = "map" if position == POSITIONS[0] else "mean"
    encode = compiled("unpack", pool, position)
    patches = random_patches(rng, GRIDS)
    order = rng.permutation(5)
    rows = [
        {int(s): (int(i), GRIDS[i]) for s, i in enumerate(order[:3])},
        {int(s) + 1: (int(i), GRIDS[i]) for s, i in enumerate(order[3:])},
    ]
    packed = pack_grids(rows, 48, 4, patches)
    together = encode(packed)
    for row, layout in enumerate(rows):
        for slot, (image, grid) in layout.items():
            single = pack_grids([{0: (image, grid)}], LONGEST, 1, patches)
            alone = encode(single)
            np.testing.assert_allclose(
                together.pooled[row, slot], alone.pooled[0, 0], atol=1e-5
            )
            np.testing.assert_allclose(
                image_tokens(together, packed, row, slot),
                image_tokens(alone, single, 0, 0),
                atol=1e-5,
            )


@pytest.mark.parametrize("options", [dict(qk_norm=True, use_bias=False), dict()])
@pytest.mark.parametrize("pool", ["map", "mean", "max"])
def test_attention_implementations_agree(pool, options, rng):
    patches = random_patches(rng, GRIDS)
    rows = [{s: (s, g) for s, g in enumerate(GRIDS)}, {1: (4, GRIDS[4])}]
    packed = pack_grids(rows, 50, 6, patches)
    a, b = (compiled(name, pool, **options)(packed) for name in ("xla", "unpack"))
    np.testing.assert_allclose(a.tokens, b.tokens, atol=1e-5)
    np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "unpack"])
def test_gradients_of_packed_equal_alone(implementation, rng):
    """Parameter gradients too: a packed batch trains exactly like its images alone."""
    vision = make_vision(
        ModelConfig(vision=vision_config(), text=None, attention=implementation)
    )
    patches = random_patches(rng, GRIDS)
    target = rng.normal(size=(5, 24)).astype(np.float32)
    packed = pack_grids([{s: (s, g) for s, g in enumerate(GRIDS)}], 50, 6, patches)
    singles = pack_grids([{0: (i, g)} for i, g in enumerate(GRIDS)], 16, 1, patches)

    @jax.jit
    def together(vision):
        pooled = vision(packed, max_image_tokens=LONGEST).pooled[0, :5]
        return (pooled * target).sum()

    @jax.jit
    def apart(vision):
        pooled = vision(singles, max_image_tokens=LONGEST).pooled[:, 0]
        return (pooled * target).sum()

    a, b = jax.grad(together)(vision), jax.grad(apart)(vision)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4)


def test_float_patches_are_taken_as_normalized(rng):
    encode = compiled("xla")
    packed = pack_grids([{0: (0, GRIDS[0])}], 16, 1, random_patches(rng, GRIDS))
    floats = packed._replace(patches=packed.patches.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(encode(packed).pooled, encode(floats).pooled, atol=1e-5)


def test_projection_and_classes(rng):
    vision = make_vision(embed_dim=10, num_classes=7)
    packed = pack_grids([{1: (0, GRIDS[0])}], 16, 3, random_patches(rng, GRIDS))
    out = jax.jit(vision)(packed)
    assert out.pooled.shape == (1, 3, 10) and out.logits.shape == (1, 3, 7)
    assert out.tokens.shape == (1, 16, 24)
    expected = out.pooled @ vision.classifier.kernel[...] + vision.classifier.bias[...]
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)


def test_no_biases_means_none():
    paths = jax.tree_util.tree_flatten_with_path(
        make_vision(use_bias=False, qk_norm=True, embed_dim=8, num_classes=2)
    )[0]
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert not [name for name in names if "bias" in name]
    assert [name for name in names if "query_norm" in name]


@pytest.mark.parametrize("remat, unroll", [("dots", 1), ("full", 1), ("none", 2)])
def test_remat_and_unroll_change_no_gradient(remat, unroll, rng):
    patches = random_patches(rng, GRIDS)
    packed = pack_grids([{0: (0, GRIDS[0]), 1: (2, GRIDS[2])}], 32, 2, patches)

    def gradient(**options):
        vision = make_vision(ModelConfig(vision=vision_config(), text=None, **options))
        return jax.jit(jax.grad(lambda v: (v(packed).pooled ** 2).sum()))(vision)

    expected, found = gradient(), gradient(remat=remat, scan_unroll=unroll)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_bfloat16_compute_keeps_float32_parameters(rng):
    model = ModelConfig(vision=vision_config(), text=None, dtype="bfloat16")
    vision = make_vision(model)
    assert {x.dtype for x in jax.tree.leaves(vision)} == {jnp.dtype("float32")}
    packed = pack_grids([{0: (0, GRIDS[0])}], 16, 1, random_patches(rng, GRIDS))
    out = jax.jit(Vision.__call__)(vision, packed)
    assert out.tokens.dtype == jnp.bfloat16 and out.pooled.dtype == jnp.float32
    full = compiled("xla")(packed).pooled[0, 0]
    low = out.pooled[0, 0]
    cosine = (full * low).sum() / jnp.linalg.norm(full) / jnp.linalg.norm(low)
    assert cosine > 0.999


def test_grid_beyond_the_table_is_an_error_outside_jit(rng):
    vision = make_vision(position=PositionConfig(kind="learned_2d", size=3))
    packed = pack_grids([{0: (0, GRIDS[0])}], 16, 1, random_patches(rng, GRIDS))
    with pytest.raises(ValueError, match="grid of 3x4 has 4 patches a side"):
        vision(packed)


def test_patch_size_is_the_models(rng):
    vision = make_vision()
    assert vision.patch.kernel.shape == (PATCH**2 * 3, 24)
    packed = pack_grids([{0: (0, (1, 2))}], 4, 1, random_patches(rng, [(1, 2)]))
    other = packed._replace(patches=np.zeros((1, 4, 6 * 6 * 3), np.uint8))
    with pytest.raises(ValueError, match=r"6x6 pixels.* 4x4: .*patch_size=4"):
        vision(other)


def test_a_tower_can_be_built_from_its_own_config():
    one = Vision(vision_config(), rngs=nnx.Rngs(0))
    other = Vision(ModelConfig(vision=vision_config()), rngs=nnx.Rngs(0))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
