"""navit.strategies against an independent restatement, on every kind of size."""

import math
from operator import attrgetter

import numpy as np
import pytest
import strategy_rules as rules

from navit import strategies

LATTICE = {"tile": 384, "canvases": tuple(rules.lattice(384, 6, 6))}
QWEN3 = {"patch": 16, "min_pixels": 4 * 32**2, "max_pixels": 1024 * 32**2}
CASES = [
    ("Square", rules.square, {"size": 336, "patch": 14, "fit": "squash"}),
    ("Square", rules.square, {"size": 384, "patch": 16, "fit": "squash"}),
    ("Square", rules.square, {"size": 336, "patch": 14, "fit": "crop"}),
    ("AnyRes", rules.anyres, {}),
    ("AnyRes", rules.anyres, LATTICE),
    ("AnyRes", rules.anyres, {**LATTICE, "shrink_above": 9}),
    ("Template", rules.template, {"patch": 16}),
    ("InternVL", rules.internvl, {}),
    ("InternVL", rules.internvl, {"max_tiles": 6, "thumbnail": False}),
    ("InternVL", rules.internvl, {"min_tiles": 2, "max_tiles": 9}),
    ("InternVL", rules.internvl, {"max_tiles": 40}),
    ("DeepSeekVL2", rules.deepseek_vl2, {}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "tiny"}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "small"}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "base"}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "large"}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "gundam"}),
    ("DeepSeekOCR", rules.deepseek_ocr, {"mode": "gundam", "max_tiles": 9}),
    ("LLaVAUHD", rules.llava_uhd, {"max_slices": 6}),
    ("LLaVAUHD", rules.llava_uhd, {"max_slices": 7}),
    ("MiniCPMV", rules.minicpmv, {}),
    ("MiniCPMV", rules.minicpmv, {"max_slices": 1}),
    ("UReader", rules.ureader, {}),
    ("UReader", rules.ureader, {"tile": 448, "max_cells": 9, "queries": 256}),
    ("LLaVAMini", rules.llava_mini, {}),
    ("LLaVAMini", rules.llava_mini, {"splits": 1}),
    ("LLaVAMini", rules.llava_mini, {"splits": 3}),
    ("QwenVL", rules.qwen_vl, {}),
    ("QwenVL", rules.qwen_vl, QWEN3),
    ("Kimi", rules.kimi, {}),
    ("Pixtral", rules.pixtral, {}),
    ("Pixtral", rules.pixtral, {"patch": 14, "side": 1540}),
    ("NaFlex", rules.naflex, {}),
    ("NaFlex", rules.naflex, {"max_tokens": 1024}),
]
TABLE = [(1500, 600), (896, 1792), (768, 1024), (720, 1280)]
NAMED = [  # the published traps, and every kind of edge
    *((1, 1), (1, 4000), (4000, 1), (3, 4000), (4000, 3), (1, 60_000), (2, 2), (1, 14)),
    *((60, 11), (11, 60), (1024, 1280), (1280, 1024), (200, 300), (300, 200)),
    *((926, 312), (312, 926), (924, 352), (352, 924), (1153, 946), (946, 1153)),
    *((10, 1999), (1999, 10), (20, 4000), (4000, 20), (28, 4480), (4480, 28)),
    *((40, 400), (400, 40), (800, 500), (1090, 1090), (800, 800), (1008, 672)),
    *((640, 640), (640, 641), (336, 336), (337, 336), (336, 24_192), (7168, 14)),
    *((7140, 14), (14, 7154), (1000, 5), (1001, 5), (5, 1000), (12_000, 9000)),
]
SHOWN = attrgetter("box", "size", "window", "grid", "role", "place", "fill")


def random_sizes() -> list[list[int]]:
    """Squares, shapes of whole tiles, photographs, and any sides from 1 to 10,000."""
    rng = np.random.default_rng(16)
    squares = np.repeat(rng.integers(1, 3000, (200, 1)), 2, 1)
    tiled = rng.integers(1, 12, (300, 2)) * rng.choice([112, 168, 192, 320], (300, 1))
    short, ratio = rng.integers(16, 3000, 700), rng.uniform(1, 4, 700)
    photos = np.stack([short, (short * ratio).astype(int)], 1)
    photos[::2] = photos[::2, ::-1]
    any_sides = np.exp(rng.uniform(0, math.log(10_000), (1000, 2))).astype(int)
    return np.concatenate([squares, tiled, photos, any_sides]).tolist()


SIZES = [*TABLE, *NAMED, *random_sizes()]


@pytest.mark.parametrize(
    ("name", "rule", "parameters"),
    CASES,
    ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(CASES)],
)
def test_views_and_tokens_are_those_of_the_published_rule(name, rule, parameters):
    strategy = getattr(strategies, name)(**parameters)
    for height, width in SIZES:
        try:
            views, tokens = rule(height, width, **parameters)
        except ValueError:
            for refused in (strategy.views, strategy.tokens):
                with pytest.raises(ValueError, match=str(height)):
                    refused(height, width)
            continue
        assert list(map(SHOWN, strategy.views(height, width))) == views, (height, width)
        assert strategy.tokens(height, width) == tokens, (height, width)


def test_a_padded_square_shows_the_original_within_a_pixel():
    """The original pads and then resizes, so its content may end between pixels."""
    strategy = strategies.Square(size=336, patch=14, fit="pad")
    for height, width in SIZES:
        (view,) = strategy.views(height, width)
        longest = max(height, width)
        top, left, bottom, right = view.window
        assert (bottom - top, right - left) == (336, 336)
        for side, size, start in zip(
            (height, width), view.size, (-top, -left), strict=True
        ):
            assert size >= 1
            assert abs(size - side * 336 / longest) < 1, (height, width)
            offset = (longest - side) // 2 * 336 / longest
            assert abs(start - offset) < 1, (height, width)
        filled = min(top, left) < 0 or bottom > view.size[0] or right > view.size[1]
        assert view.fill == (rules.CLIP_GREY if filled else None), (height, width)
        assert (view.box, view.grid) == ((0, 0, height, width), (24, 24))
        assert (view.role, view.place) == ("whole", None)
        assert strategy.tokens(height, width) == 576


def test_a_lattice_of_canvases_has_every_grid_the_width_outermost():
    lattice = strategies.AnyRes.grid(384, 2, 3)
    assert list(map(tuple, lattice)) == rules.lattice(384, 2, 3)


def test_the_restatement_gives_the_published_tokens():
    tokens = [
        [
            rules.anyres(*size)[1],
            rules.internvl(*size)[1],
            rules.qwen_vl(*size)[1],
            rules.deepseek_ocr(*size)[1],
            rules.minicpmv(*size)[1],
            rules.naflex(*size, max_tokens=1024)[1],
        ]
        for size in TABLE
    ]
    assert tokens == [
        [2076, 2818, 1136, 603, 320, 1000],
        [1752, 2306, 1252, 483, 576, 968],
        [2340, 3330, 1001, 893, 320, 972],
        [1948, 2306, 1198, 483, 448, 1008],
    ]


def test_the_restatement_has_the_published_traps():
    assert rules.anyres(200, 300)[1] == 976
    assert rules.anyres(924, 352)[1] == 2126
    assert rules.anyres(1153, 946, **LATTICE, shrink_above=9)[1] == 8765
    assert len(rules.internvl(1024, 1280, max_tiles=6)[0]) == 7
    assert len(rules.internvl(60, 11, max_tiles=6)[0]) == 7
    assert len(rules.internvl(40, 400, thumbnail=False)[0]) == 10
    assert rules.qwen_vl(10, 1999)[0][0][1] == (28, 812)
    assert rules.minicpmv(28, 4480)[0][0][1] == (28, 5600)
    assert rules.ureader(926, 312)[0][1][1] == (6 * 224, 2 * 224)
    assert rules.llava_uhd(1008, 672)[1] == 1014
    assert math.prod(rules.kimi(896, 1792)[0][0][3]) == 4232
    assert rules.template(800, 500)[0][0][1] == (768, 384)
    modes = ("tiny", "small", "base", "large")
    tokens = [rules.deepseek_ocr(500, 500, mode)[1] for mode in modes]
    assert tokens == [73, 111, 273, 421]
