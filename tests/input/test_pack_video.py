"""Clips: what a patch, a segment and a row of them hold, and how a tower takes them."""

import jax
import numpy as np
import pytest
from helpers import make_vision

import navit
from navit.config import PositionConfig, RotaryConfig

SMALL = dict(patch_size=4, min_pixels=64, max_pixels=64 * 12)


def clip(rng, frames=5, size=(24, 32)):
    return rng.integers(0, 256, (frames, *size, 3)).astype(np.uint8)


def test_a_patch_has_its_place_in_each_frame(rng):
    """Frames of their own size stay as they are; the last fills the last patch."""
    frames = clip(rng)
    packed = navit.pack_video(frames, **SMALL)
    packed.check()
    assert packed.patches.shape == (3, 48, 2 * 48) and packed.grids.shape == (3, 1, 2)
    assert (packed.grids == (6, 8)).all() and (packed.segment_ids == 1).all()
    for group, pair in enumerate(((0, 1), (2, 3), (4, 4))):
        for token, (row, column) in enumerate(packed.coords[group]):
            place = np.s_[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            expected = np.stack([frames[i][place] for i in pair])
            np.testing.assert_array_equal(
                packed.patches[group, token], expected.reshape(-1)
            )


def test_segments_of_one_clip_or_of_each_group(rng):
    frames = clip(rng)
    apart = navit.pack_video(frames, row_tokens=100, **SMALL)
    apart.check()
    assert apart.grids[..., 0].tolist() == [[6, 6], [6, 0]]
    whole = navit.pack_video(frames, together=True, **SMALL)
    whole.check()
    assert whole.grids.tolist() == [[[3, 6, 8]]] and (whole.segment_ids == 1).all()
    np.testing.assert_array_equal(whole.coords[0, :, 0], np.repeat(np.arange(3), 48))
    np.testing.assert_array_equal(whole.patches[0, :96], apart.patches[0, :96])
    (back,) = navit.unpack(whole.patches, whole)
    assert back.shape == (3, 6, 8, 96)
    np.testing.assert_array_equal(back[2], whole.patches[0, 96:].reshape(6, 8, 96))


def test_the_clip_shares_its_pixels(rng):
    """qwen-vl-utils: total / frames * 2 at most, and 1.05 times the least at least."""
    options = dict(patch_size=4, min_pixels=64, max_pixels=10_000)
    many = clip(rng, 8, (64, 64))
    for total, side in ((10**9, 16), (8 * 2048, 16), (8 * 512, 8), (8, 2)):
        packed = navit.pack_video(many, total_pixels=total, **options)
        assert packed.grids.tolist() == [[[side, side]]] * 4, total


def test_a_tower_takes_clips_and_stills(rng):
    vision = make_vision(
        patch_frames=2,
        position=PositionConfig(kind="none"),
        rotary=RotaryConfig("qwen"),
        pool="mean",
    )
    still = clip(rng, 1)
    run = jax.jit(vision)
    as_clip = run(navit.pack_video(still, **SMALL))
    as_image = run(navit.pack(list(still), patch_size=4, max_tokens=48, row_tokens=48))
    np.testing.assert_allclose(as_clip.pooled, as_image.pooled, atol=1e-5)
    frames = clip(rng, 4)
    apart = run(navit.pack_video(frames, **SMALL)).pooled[:, 0]
    moved = np.concatenate([frames[:2], 255 - frames[2:]])
    for together, same in ((False, True), (True, False)):
        options = {**SMALL, "together": together}
        before, after = (
            run(navit.pack_video(x, **options)).tokens.reshape(2, 48, -1)
            for x in (frames, moved)
        )
        assert np.array_equal(before[0], after[0]) == same
    assert np.abs(apart[0] - apart[1]).max() > 1e-4


def test_errors_name_the_frame(rng):
    with pytest.raises(ValueError, match="no frames"):
        navit.pack_video([])
    with pytest.raises(ValueError, match=r"'clip\.mp4', but navit decodes no video"):
        navit.pack_video("clip.mp4")
    frames = [*clip(rng, 2), clip(rng, 1, (8, 8))[0]]
    with pytest.raises(ValueError, match=r"frame 2 is \[8, 8\] pixels, and frame 0"):
        navit.pack_video(frames)
    with pytest.raises(ValueError, match="48 tokens, more than a row of row_tokens=9"):
        navit.pack_video(clip(rng), row_tokens=9, **SMALL)
