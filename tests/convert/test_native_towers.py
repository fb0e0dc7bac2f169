"""Other native-resolution towers: the originals' numbers, alone and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import navit
from navit.batch import PackedImages, PackedTokens
from navit.model import rotary
from navit.model.windows import window_ids
from navit.weights import read
from tests.convert.test_convert import GOLDEN, expected

MERGED = ["kimi_vl", "qwen2_vl", "qwen2_5_vl"]
MORE = ["qwen3_vl", "pixtral", "ovis2_5"]
TIMM = ["timm_gap", "timm_par", "timm_parfac", "timm_siglip"]


def in_rows(images, rows):
    """Images (patches, grid) in rows, as the lists of their numbers say."""
    most = max(sum(len(images[i][0]) for i in row) for row in rows) + 5
    slots = max(map(len, rows)) + 1
    out = PackedImages(
        np.zeros((len(rows), most, images[0][0].shape[1]), np.float32),
        np.zeros((len(rows), most), np.int32),
        np.zeros((len(rows), most, 2), np.int32),
        np.zeros((len(rows), slots, 2), np.int32),
    )
    for b, row in enumerate(rows):
        start = 0
        for slot, i in enumerate(row):
            patches, grid = images[i]
            tokens = slice(start, start := start + len(patches))
            out.patches[b, tokens] = patches
            out.segment_ids[b, tokens] = slot + 1
            out.coords[b, tokens] = np.indices(tuple(grid)).reshape(2, -1).T
            out.grids[b, slot] = grid
    out.check()
    return out


def layouts(count):
    yield [[i] for i in range(count)]
    yield [list(range(count))]
    yield [list(range(count))[::-1]]


@pytest.fixture(scope="module", params=[*MERGED, *MORE, *TIMM])
def tower(request):
    model, want = navit.load(GOLDEN / request.param), expected(request.param)
    images = [(want[f"patches_{i}"], g) for i, g in enumerate(want["grids"])]

    @jax.jit
    def encode(packed):
        out = model.vision(packed)
        merged = None if model.model.merger is None else model.merger(out.packed)
        return out, merged

    return encode, want, images


def test_tokens_equal_the_originals_alone_and_packed(tower):
    encode, want, images = tower
    for rows in layouts(len(images)):
        packed = in_rows(images, rows)
        out, merged = jax.tree.map(np.asarray, encode(packed))
        for b, row in enumerate(rows):
            for slot, i in enumerate(row):
                own = packed.segment_ids[b] == slot + 1
                got = {
                    "tokens": out.packed.tokens[b, own],
                    "pooled": out.pooled[b, slot],
                }
                if out.logits is not None:
                    got["logits"] = out.logits[b, slot]
                if merged is not None:
                    got["merged"] = merged.tokens[b, merged.segment_ids[b] == slot + 1]
                    got["merged"] = got["merged"].reshape(want[f"merged_{i}"].shape)
                    assert merged.grids[b, slot].tolist() == [*got["merged"].shape[:2]]
                for name, value in got.items():
                    if f"{name}_{i}" in want:
                        np.testing.assert_allclose(
                            value, want[f"{name}_{i}"], atol=5e-5, err_msg=name
                        )


@pytest.mark.parametrize("name", MERGED)
def test_images_become_the_pixels_that_the_original_gets(name):
    """Mean and std, padding, the processor's bounds: `features` needs no settings."""
    model, want = navit.load(GOLDEN / name), expected(name)
    (tokens,) = model.features([want["image"]])
    assert tokens.shape[:2] == (6, 10)
    flat = tokens.reshape(60, -1)
    np.testing.assert_allclose(flat, want["image_tokens"], atol=5e-5)
    (merged,) = model.features([want["image"]], merged=True)
    np.testing.assert_allclose(merged, want["image_merged"], atol=5e-5)
    (whole,) = model.features(
        [want["image"]], strategy=model.config.data.strategy, merged=True
    )
    np.testing.assert_array_equal(whole[0].tokens, merged)
    (fewer,) = model.features([want["image"]], max_tokens=30, merged=True)
    assert fewer.shape[0] * fewer.shape[1] < merged.shape[0] * merged.shape[1]
    mean = tokens.mean((0, 1))
    z = model.embed_images([want["image"]])[0]
    np.testing.assert_allclose(z, mean / np.linalg.norm(mean), atol=5e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_clip_equals_transformers(name):
    """Patches of two frames, which attend within their own patch in time."""
    model, want = navit.load(GOLDEN / name), expected(name)
    packed = in_rows([(patches, (6, 4)) for patches in want["clip"]], [[1, 0]])
    merged = model.merger(model.vision(packed).packed)
    for slot, i in enumerate((1, 0)):
        got = merged.tokens[0, merged.segment_ids[0] == slot + 1]
        np.testing.assert_allclose(
            got.reshape(3, 2, -1), want["clip_merged"][i], atol=5e-5
        )


def test_the_merger_joins_blocks_of_each_frame_and_refuses_odd_grids():
    """A clip in one segment gives what its frames give by themselves."""
    module = navit.load(GOLDEN / "kimi_vl").merger
    merger = jax.jit(lambda packed: module(packed))
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((3, 8, 24)).astype(np.float32)
    coords = np.indices((3, 2, 4)).reshape(3, -1).T.astype(np.int32)
    mixed = rng.permutation(24)
    clip = PackedTokens(
        frames.reshape(1, 24, -1)[:, mixed],
        np.ones((1, 24), np.int32),
        coords[None, mixed],
        np.array([[[3, 2, 4]]], np.int32),
    )
    apart = PackedTokens(
        frames, np.ones((3, 8), np.int32), coords.reshape(3, 8, 3)[..., 1:],
        np.array([[[2, 4]]] * 3, np.int32),
    )  # fmt: skip
    together, alone = merger(clip), merger(apart)
    np.testing.assert_allclose(
        together.tokens.reshape(3, 2, -1), alone.tokens, atol=1e-6
    )
    assert together.coords[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert together.grids.tolist() == [[[3, 1, 2]]]
    odd = apart._replace(grids=np.array([[[1, 8]]] * 3, np.int32))
    with pytest.raises(ValueError, match="a grid of 1x8 patches is not made of 2x2"):
        module(odd)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_turns_and_windows_equal_transformers(name):
    """Cosines and sines to a bit's rounding: angles are equal (`test_rotary.py`)."""
    want, vision = expected(name), read(GOLDEN / name).model.vision
    for i, grid in enumerate(want["grids"]):
        coords = np.indices(tuple(grid)).reshape(2, -1).T[None].astype(np.int32)
        np.testing.assert_array_equal(coords[0], want[f"positions_{i}"])
        width = vision.width // vision.num_heads
        coords, own = jnp.asarray(coords), jnp.broadcast_to(grid, coords.shape)
        turn = rotary.rotation(vision.rotary, coords, own, width)
        for part in ("cos", "sin"):
            got = np.tile(getattr(turn, part)[0], 2)
            np.testing.assert_array_max_ulp(got, want[f"{part}_{i}"], maxulp=1)
        if vision.window:
            ids = jnp.ones(coords.shape[:2], jnp.int32)
            got = window_ids(ids, coords, jnp.array(grid[None, None]), vision.window)[0]
            same = want[f"windows_{i}"]
            np.testing.assert_array_equal(
                np.asarray(got)[:, None] == np.asarray(got), same[:, None] == same
            )
