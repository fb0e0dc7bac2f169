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

import navit
from navit.batch import PackedImages
from navit.config import ModelConfig, PositionConfig
from navit.embed_rows import embed_packed
from navit.model.vision import Vision

GRIDS = [(3, 4), (1, 9), (5, 2), (1, 1), (4, 4)]
LONGEST = 16


def model_of(implementation, pool="map", position=POSITIONS[0], **config):
    return ModelConfig(
        vision=vision_config(pool=pool, position=position, **config),
        text=None,
        attention=implementation,
    )


@functools.cache
def compiled(implementation, **config):
    vision = make_vision(model_of(implementation, **config))
    return jax.jit(lambda packed: vision(packed, max_image_tokens=LONGEST))


@functools.cache
def compiled_with_gradient(implementation, pool, **config):
    """packed -> its output, and how the image in slot 1 depends on all patches.

    One program for many tests: compiling it is nearly all that they cost.
    """
    vision = make_vision(model_of(implementation, pool, **config))

    def total(patches, packed):
        out = vision(packed._replace(patches=patches), max_image_tokens=LONGEST)
        if pool == "none":
            own = (packed.segment_ids == 2)[..., None]
            return (out.tokens**2 * own).sum(), out
        return (out.pooled[:, 1] ** 2).sum(), out

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def encode(packed):
        (_, out), gradient = run(jnp.asarray(packed.patches), packed)
        return out, np.asarray(gradient)

    return encode


def normalized(packed):
    return packed._replace(patches=packed.patches.astype(np.float32) / 127.5 - 1)


def image_tokens(out, packed, row, slot):
    return np.asarray(out.tokens)[row, np.asarray(packed.segment_ids)[row] == slot + 1]


CASES = [
    *itertools.product(["xla", "unpack"], ["map", "mean", "max", "none"]),
    ("blocks", "mean"),
]


@pytest.mark.parametrize("implementation, pool", CASES)
def test_leak_proof(implementation, pool, rng):
    """Change or delete image A: image B is bit-equal, and d(B)/d(A) is exactly 0."""
    encode = compiled_with_gradient(implementation, pool)
    patches = random_patches(rng, GRIDS)
    row = {0: (0, GRIDS[0]), 1: (1, GRIDS[1]), 2: (2, GRIDS[2])}
    packed = normalized(pack_grids([row], 40, 4, patches))
    before, gradient = encode(packed)

    changed = packed._replace(patches=packed.patches.copy())
    changed.patches[0, :12] *= -1
    deleted = PackedImages(*(x.copy() for x in packed))
    deleted.patches[0, :12], deleted.segment_ids[0, :12] = 0, 0
    deleted.coords[0, :12], deleted.grids[0, 0] = 0, 0
    for other in (changed, deleted):
        after, _ = encode(other)
        for slot in (1, 2):
            np.testing.assert_array_equal(
                image_tokens(before, packed, 0, slot),
                image_tokens(after, packed, 0, slot),
            )
            if pool != "none":
                np.testing.assert_array_equal(
                    before.pooled[0, slot], after.pooled[0, slot]
                )
    own = image_tokens(encode(changed)[0], packed, 0, 0)
    assert np.abs(own - image_tokens(before, packed, 0, 0)).max() > 1e-3

    assert (gradient[0, :12] == 0).all() and (gradient[0, 21:] == 0).all()
    assert np.abs(gradient[0, 12:21]).max() > 0


def test_leak_proof_of_uint8_patches(rng):
    """Also in the program that embeds images: every bit of B's embedding stays."""
    vision = make_vision(model_of("unpack"))
    patches = random_patches(rng, GRIDS)
    row = {0: (0, GRIDS[0]), 1: (1, GRIDS[1])}
    packed = pack_grids([row], 24, 3, patches)
    replaced = pack_grids([row], 24, 3, [255 - patches[0], patches[1]])
    removed = packed._replace(
        patches=packed.patches.copy(),
        segment_ids=packed.segment_ids * (packed.segment_ids != 1),
        grids=packed.grids * np.array([[[0], [1], [1]]], np.int32),
    )
    removed.patches[0, :12] = 0
    a, b = embed_packed(vision, packed, LONGEST, True)[0, :2]
    for other in (replaced, removed):
        after = embed_packed(vision, other, LONGEST, True)[0]
        np.testing.assert_array_equal(after[1], b)
        assert np.abs(after[0] - a).max() > 1e-3


@pytest.mark.parametrize("implementation, pool", CASES)
def test_padding_can_hold_anything(implementation, pool, rng):
    """Garbage patches and coords in padding change no bit anywhere."""
    encode = compiled_with_gradient(implementation, pool)
    patches = random_patches(rng, GRIDS)
    packed = pack_grids([{0: (0, GRIDS[0]), 2: (1, GRIDS[1])}], 40, 4, patches)
    packed = normalized(packed)
    pad = packed.segment_ids == 0
    packed.patches[pad] = 0
    before, _ = encode(packed)
    for value in (0.5, -3e38, 3e38, np.inf):
        poisoned = PackedImages(*(x.copy() for x in packed))
        poisoned.patches[pad] = value
        poisoned.coords[pad] = rng.integers(-(2**31), 2**31 - 1, (pad.sum(), 2))
        after, gradient = encode(poisoned)
        np.testing.assert_array_equal(before.tokens, after.tokens)
        assert (gradient[pad] == 0).all()
        if pool != "none":
            np.testing.assert_array_equal(before.pooled, after.pooled)
            assert (np.asarray(after.pooled)[0, [1, 3]] == 0).all()


# One of each kind. `test_positions` proves of all of them that a token's vector depends
# only on its own coords and grid, whatever else is in the row.
KINDS = [
    PositionConfig(),
    PositionConfig(kind="learned_1d", size=64),
    PositionConfig(kind="learned_2d", size=16),
    PositionConfig(
        kind="factorized", coordinates="fractional_aspect", encoding="fourier", size=16
    ),
]


@pytest.mark.parametrize("position", KINDS, ids=lambda position: position.kind)
def test_packed_equals_alone(position, rng):
    """Any image, in any slot and row, with any neighbours."""
    # The simplest head for all position embeddings but one compiles twice as fast.
    pool = "map" if position == POSITIONS[0] else "mean"
    encode = compiled("unpack", pool=pool, position=position)
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


@pytest.mark.parametrize(
    "pool, options",
    [
        *itertools.product(["map", "mean", "max"], [dict()]),
        # Of the tokens, which no head changes.
        ("none", dict(qk_norm=True, use_bias=False)),
    ],
)
def test_attention_implementations_agree(pool, options, rng):
    patches = random_patches(rng, GRIDS)
    for images in ((0, 1, 2, 3), (4, 3, 1)):
        rows = [{slot: (i, GRIDS[i]) for slot, i in enumerate(images)}]
        packed = normalized(pack_grids(rows, 40, 4, patches))
        a, b = (
            compiled_with_gradient(name, pool, **options)(packed)
            for name in ("xla", "unpack")
        )
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "unpack"])
def test_gradients_of_packed_equal_alone(implementation, rng):
    """Parameter gradients too: a packed batch trains exactly like its images alone."""
    vision = make_vision(model_of(implementation))
    patches = random_patches(rng, GRIDS)
    target = rng.normal(size=(5, 24)).astype(np.float32)
    together = [{s: (s, g) for s, g in enumerate(GRIDS)}, {}, {}, {}, {}]
    apart = [{0: (i, g)} for i, g in enumerate(GRIDS)]

    @jax.jit
    @jax.grad
    def gradient(vision, packed, rows, slots):
        pooled = vision(packed, max_image_tokens=LONGEST).pooled[rows, slots]
        return (pooled * target).sum()

    each, first = np.arange(5), np.zeros(5, int)
    a = gradient(vision, pack_grids(together, 50, 5, patches), first, each)
    b = gradient(vision, pack_grids(apart, 50, 5, patches), each, first)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4)


def test_float_patches_are_taken_as_normalized(rng):
    encode = compiled("xla")
    packed = pack_grids([{0: (0, GRIDS[0])}], 16, 1, random_patches(rng, GRIDS))
    np.testing.assert_allclose(
        encode(packed).pooled, encode(normalized(packed)).pooled, atol=1e-5
    )


def test_projection_and_classes(rng):
    vision = make_vision(embed_dim=10, num_classes=7)
    packed = pack_grids([{1: (0, GRIDS[0])}], 16, 3, random_patches(rng, GRIDS))
    out = jax.jit(vision)(packed)
    assert out.pooled.shape == (1, 3, 10) and out.logits.shape == (1, 3, 7)
    assert out.tokens.shape == (1, 16, 24)
    for found, given in zip(out.packed[1:], packed[1:], strict=True):
        np.testing.assert_array_equal(found, given)
    (tokens,) = navit.unpack(out.packed)
    np.testing.assert_array_equal(tokens.reshape(12, 24), out.tokens[0, :12])
    (other,) = navit.unpack(out.tokens, packed)
    np.testing.assert_array_equal(tokens, other)
    with pytest.raises(TypeError, match=r"pass out\.packed"):
        navit.unpack(out.tokens)
    kernel, bias = vision.classifier.kernel[...], vision.classifier.bias[...]
    expected = out.pooled @ kernel + bias[None, None]
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)


def test_pooling_weights_are_shares_of_an_image(rng):
    """They sum to 1 over each image, are those of the image alone, and 0 at padding."""
    vision, patches = make_vision(), random_patches(rng, GRIDS)
    packed = pack_grids([{0: (0, GRIDS[0]), 2: (1, GRIDS[1])}], 40, 3, patches)
    alone = pack_grids([{0: (1, GRIDS[1])}], 40, 1, patches)
    weights, own = (
        vision.pooling_weights(vision(images).packed) for images in (packed, alone)
    )
    first, second = navit.unpack(weights, packed)
    assert first.shape == (*GRIDS[0], vision.config.num_heads)
    for image in (first, second):
        np.testing.assert_allclose(image.sum((0, 1)), 1, atol=1e-5)
    np.testing.assert_allclose(second, navit.unpack(own, alone)[0], atol=1e-5)
    assert (np.asarray(weights)[packed.segment_ids == 0] == 0).all()
    with pytest.raises(ValueError, match='pool="mean" has no pooling weights'):
        make_vision(pool="mean").pooling_weights(vision(packed).packed)


def test_no_biases_means_none():
    paths = jax.tree_util.tree_flatten_with_path(
        make_vision(use_bias=False, qk_norm=True, embed_dim=8, num_classes=2)
    )[0]
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert not [name for name in names if "bias" in name]
    assert [name for name in names if "query_norm" in name]


def test_remat_and_unroll_change_no_gradient(rng):
    patches = random_patches(rng, GRIDS)
    packed = pack_grids([{0: (0, GRIDS[0]), 1: (2, GRIDS[2])}], 32, 2, patches)

    def gradient(**options):
        config = ModelConfig(vision=vision_config(pool="mean"), text=None, **options)
        vision = make_vision(config)
        return jax.jit(jax.grad(lambda v: (v(packed).pooled ** 2).sum()))(vision)

    expected = gradient(remat="none")
    others = [dict(remat=x) for x in ("auto", "dots", "attention", "full")]
    for options in (*others, dict(scan_unroll=2)):
        found = gradient(**options)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=str(options))


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
