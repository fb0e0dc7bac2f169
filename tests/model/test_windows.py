"""Windows: which tokens are in one, how many a row has, and which blocks use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import make_vision, pack_grids, random_patches, vision_config

from navit.config import ModelConfig
from navit.model import vision as tower
from navit.model.attention import attention_qkvpacked
from navit.model.vision import Vision
from navit.model.windows import most_windows, window_ids


def test_window_ids_by_hand():
    grids = np.int32([[[0, 0], [5, 7], [2, 3]]])
    coords = np.zeros((1, 50, 2), np.int32)
    segments = np.zeros((1, 50), np.int32)
    coords[0, :35] = np.indices((5, 7)).reshape(2, -1).T
    coords[0, 40:46] = np.indices((2, 3)).reshape(2, -1).T
    segments[0, :35], segments[0, 40:46] = 2, 3
    found = window_ids(*map(jnp.asarray, (segments, coords, grids)), 3)
    found = np.asarray(found)[0]
    for token, (row, column) in enumerate(coords[0]):
        expected = row // 3 * 3 + column // 3 + 1
        if segments[0, token] == 3:
            expected = 6 + 1
        assert found[token] == expected * (segments[0, token] > 0)


def test_no_row_has_more_windows_than_its_bound(rng):
    for _ in range(200):
        window, slots = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        grids = (
            rng.integers(1, 30, (slots, 2))
            if rng.random() < 0.5
            else 1 + (rng.integers(0, 30, (slots, 2)) * [0, 1])
        )
        tokens = int(grids.prod(-1).sum())
        count = int((-(-grids // window)).prod(-1).sum())
        assert count <= most_windows(tokens, slots, window)


def test_windows_select_the_blocks_that_see_the_whole_image(rng):
    packed = pack_grids([{0: (0, (4, 5))}], 24, 1, random_patches(rng, [(4, 5)]))

    def tokens(**options):
        return jax.jit(make_vision(pool="none", **options))(packed).tokens

    whole = tokens()
    some = tokens(window=2, full_blocks=(0,))
    same = tokens(window=5, full_blocks=(1,))
    np.testing.assert_allclose(same, whole, atol=1e-6)
    assert np.abs(some - whole).max() > 1e-3
    assert np.abs(some - tokens(window=2, full_blocks=(1,))).max() > 1e-3


def test_windows_do_not_choose_by_a_bound_that_no_row_reaches(monkeypatch):
    """Of short images, "unpack" would make room for several times the windows."""
    given = []

    def attend(qkv, ids, *, width, **options):
        given.append(options)
        return attention_qkvpacked(qkv, ids, width=width, **options)

    monkeypatch.setattr(tower, "attention_qkvpacked", attend)
    packed = pack_grids([{0: (0, (4, 5))}], 24, 1, [np.zeros((20, 48), np.uint8)])
    for implementation in ("auto", "unpack"):
        vision = vision_config(pool="none", window=2, full_blocks=(0,))
        model = ModelConfig(vision=vision, text=None, attention=implementation)
        run = functools.partial(Vision(model), max_image_tokens=20)
        jax.eval_shape(run, packed)
    assert given[0] == {"implementation": None}
    assert given[-1]["max_segments"] == most_windows(24, 1, 2)
