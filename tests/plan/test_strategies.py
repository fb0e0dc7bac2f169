"""What holds for every resolution strategy, whatever its rule."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import navit
from navit import strategies
from navit.plan.strategies import views as rules

ALL = [kind() for kind in strategies.BY_NAME.values()]
ALL += [
    strategies.Square(fit="crop"),
    strategies.Square(fit="pad"),
    strategies.DeepSeekOCR("base"),
    strategies.AnyRes(384, canvases=strategies.AnyRes.grid(384, 6, 6), shrink_above=9),
    strategies.UReader(448, 9, queries=256),
]
SIDES = 2 ** np.random.default_rng(0).uniform(3, 12, (120, 2))
SIZES = [*SIDES.astype(int).tolist(), [1, 1], [7, 8], [640, 641], [4000, 3], [3, 4000]]


def taken(strategy, **options):
    """(height, width, views) of the sizes that a strategy takes."""
    for height, width in SIZES:
        try:
            yield height, width, strategy.views(height, width, **options)
        except ValueError as error:
            assert f"{height}x{width}" in str(error)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_views_lie_in_the_image_and_tiles_partition_their_canvas(strategy):
    for height, width, views in taken(strategy):
        shown = {}
        for view in views:
            top, left, bottom, right = view.box
            assert 0 <= top < bottom <= height and 0 <= left < right <= width
            high, wide = (view.window[i + 2] - view.window[i] for i in (0, 1))
            assert view.grid == (high // strategy.patch, wide // strategy.patch)
            assert min(*view.grid, *view.size) >= 1
            beyond = min(view.window[:2]) < 0 or any(
                end > side for end, side in zip(view.window[2:], view.size, strict=True)
            )
            assert (view.fill is not None) == beyond
            valid = view.valid(strategy.patch)
            assert valid.shape == view.grid and (beyond or valid.all())
            if view.role == "tile" and len({v.box for v in views}) == 1:
                shown[view.place] = view.window
        assert [v.role for v in views].count("whole") == (len(views) == 1)
        rows = 1 + max((row for row, _ in shown), default=-1)
        columns = 1 + max((column for _, column in shown), default=-1)
        assert list(shown) == [(r, c) for r in range(rows) for c in range(columns)]
        for (row, column), (top, left, bottom, right) in shown.items():
            # A tile begins where the one above, and the one to its left, ends.
            assert row == 0 or shown[row - 1, column][2] == top
            assert column == 0 or shown[row, column - 1][3] == left
            assert {(bottom - top, right - left)} == {
                (w[2] - w[0], w[3] - w[1]) for w in shown.values()
            }


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_tokens_are_those_of_the_layout(strategy):
    for images in (1, 2, 5):
        for height, width, views in taken(strategy, images=images):
            layout = strategy.layout(height, width, images=images)
            tokens = strategy.tokens(height, width, images=images)
            assert tokens == sum(
                1
                if isinstance(part, strategies.Separator)
                else part.rows * (part.columns + part.newlines)
                for part in layout
            )
            named = [part.view for part in layout if isinstance(part, strategies.Block)]
            assert all(view is None or view < len(views) for view in named)
            if None not in named:
                assert sorted(named) == list(range(len(views)))


def test_several_images_share_the_tiles():
    internvl = strategies.InternVL(max_tiles=12)
    assert len(internvl.views(448, 12 * 448)) == 13
    assert len(internvl.views(448, 12 * 448, images=4)) == 4
    assert len(internvl.views(448, 12 * 448, images=20)) == 1
    vl2 = strategies.DeepSeekVL2()
    assert len(vl2.views(1152, 1152, images=2)) == 10
    assert len(vl2.views(1152, 1152, images=3)) == 2
    assert vl2.tokens(1152, 1152, images=3) == 421
    onevision = strategies.AnyRes(
        384, canvases=strategies.AnyRes.grid(384, 6, 6), shrink_above=9
    )
    assert onevision.tokens(900, 900, images=2) == 730


def test_maxima_that_the_papers_state():
    assert max(strategies.AnyRes().tokens(*size) for size in SIZES) <= 2928
    internvl = strategies.InternVL(max_tiles=12)
    assert max(internvl.tokens(*size) for size in SIZES) <= 13 * 256 + 2
    gundam = strategies.DeepSeekOCR()
    tokens = [gundam.tokens(h, w) for h, w, _ in taken(gundam)]
    assert min(tokens) == 273 and max(tokens) <= 933
    vl2 = strategies.DeepSeekVL2()
    tokens = [vl2.tokens(h, w) for h, w, _ in taken(vl2)]
    assert min(tokens) == 421 and max(tokens) <= 2101


def test_filler_is_what_the_padding_covers():
    (view,) = strategies.Square(28, 14, fit="pad").views(1, 2)
    assert view.size == (14, 28) and view.window == (0, 0, 28, 28)
    np.testing.assert_array_equal(view.valid(14), [[True, True], [False, False]])
    (view,) = strategies.Kimi().views(30, 60)
    assert view.grid == (4, 6)
    expected = np.zeros((4, 6), bool)
    expected[:3, :5] = True  # the third row of patches has two lines of the image
    np.testing.assert_array_equal(view.valid(14), expected)


def test_naflex_is_grid_for():
    for height, width, (view,) in taken(strategies.NaFlex(16, 100)):
        assert view.grid == navit.grid_for(height, width, max_tokens=100)


def test_a_strategy_is_found_by_its_name():
    assert strategies.by_name("internvl", max_tiles=6) == strategies.InternVL(
        max_tiles=6
    )
    with pytest.raises(ValueError, match="did you mean 'internvl'"):
        strategies.by_name("intervl")
    with pytest.raises(ValueError, match="did you mean 'max_tiles'"):
        strategies.by_name("internvl", max_tile=6)
    with pytest.raises(ValueError, match=r"InternVL.max_tiles .* 0"):
        strategies.by_name("internvl", max_tiles=0)


def test_fields_are_checked():
    for kind in strategies.BY_NAME.values():
        for field in dataclasses.fields(kind):
            if field.type == "int":
                with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field.name}"):
                    kind(**{field.name: -1})
    with pytest.raises(ValueError, match="not made of tiles"):
        strategies.AnyRes(canvases=((500, 336),))
    with pytest.raises(ValueError, match="images must be at least 1"):
        strategies.Square().views(9, 9, images=0)


def test_what_the_originals_refuse_is_an_error_that_names_the_size():
    with pytest.raises(ValueError, match="201x1 pixels has an aspect of 201:1"):
        strategies.QwenVL().views(201, 1)
    utils = strategies.QwenVL(qwen_vl_utils=True, max_pixels=28 * 28 * 100)
    with pytest.raises(ValueError, match="20x4000 pixels is resized to 0x"):
        utils.views(20, 4000)
    assert utils.views(10, 1999)[0].size == (28, 1988)
    with pytest.raises(ValueError, match="8000x14 pixels"):
        strategies.Kimi().tokens(8000, 14)
    with pytest.raises(ValueError, match="0x5 pixels has no views"):
        strategies.NaFlex().tokens(0, 5)


def test_strategies_are_imported_as_a_name_of_navit():
    code = "from navit import strategies as s; print(s.BY_NAME['qwen'].__name__)"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "QwenVL\n"
    assert rules.count(()) == 0


@pytest.mark.parametrize("name", strategies.BY_NAME)
def test_a_side_without_a_whole_token_is_refused(name):
    known = {field.name for field in dataclasses.fields(strategies.BY_NAME[name])}
    if name in ("llava_uhd", "minicpm_v"):  # their sides are at least one patch
        known = set()
    for side in known & {"size", "tile", "base"}:
        with pytest.raises(ValueError, match=f"{side}=13 is less than"):
            strategies.by_name(name, **{side: 13})
