"""Measures of views follow from their boxes, and costs agree with the model's own."""

import numpy as np
import pytest

from navit import strategies
from navit.config import ModelConfig
from navit.model import variants
from navit.model.flops import Counts, forward
from navit.plan.strategies.measures import cuts_of, measure

TOWER = variants.vision("L/14")
SIZES = [(1500, 600), (896, 1792), (768, 1024), (720, 1280), (333, 77), (5, 5)]


def measured(strategy, height, width, object_size=(64, 64)):
    return measure(strategy, height, width, tower=TOWER, object_size=object_size)


def test_scales_are_those_of_the_reference():
    expected = {
        strategies.Square(fit="pad"): (0.22, 0.19, 0.33, 0.26),
        strategies.AnyRes(): (0.56, 0.38, 0.66, 0.53),
        strategies.InternVL(): (1.49, 1.00, 1.75, 1.24),
        strategies.QwenVL(): (0.98, 0.78, 0.98, 1.01),
        strategies.DeepSeekOCR(): (1.07, 0.71, 1.67, 0.89),
        strategies.MiniCPMV(): (0.93, 1.00, 1.01, 1.13),
        strategies.NaFlex(max_tokens=1024): (0.53, 0.39, 0.56, 0.53),
    }
    for strategy, scales in expected.items():
        for (height, width), scale in zip(SIZES[:4], scales, strict=True):
            found = measured(strategy, height, width).scale
            assert abs(found - scale) < 0.0101, (strategy, height, width, found)


@pytest.mark.parametrize("name", strategies.BY_NAME)
def test_shares_are_shares_and_tokens_are_counted_once(name):
    strategy = strategies.by_name(name)
    for height, width in SIZES:
        found = measured(strategy, height, width)
        for share in (found.kept, found.padding, found.thumbnail, found.cut):
            assert -1e-9 <= share <= 1 + 1e-9
        assert found.encoder_tokens == sum(np.prod(v.grid) for v in found.views)
        assert found.tokens == strategy.tokens(height, width)
        assert found.scale > 0 and found.distortion > 0
        if all(view.role == "whole" and view.fill is None for view in found.views):
            assert found.padding == 0 and found.thumbnail == 0


def test_the_flops_are_those_of_the_image_tower():
    for strategy in (strategies.InternVL(), strategies.NaFlex(14, 500)):
        found = measured(strategy, 900, 500)
        lengths = [int(np.prod(view.grid)) for view in found.views]
        counts = Counts(sum(lengths), sum(n * n for n in lengths), len(lengths))
        model = ModelConfig(vision=variants.vision(f"L/{strategy.patch}"))
        parts = forward(model, counts)
        assert found.flops == parts.vision + parts.attention


def test_the_padding_of_a_square_is_what_its_aspect_leaves():
    found = measured(strategies.Square(400, 10, fit="pad"), 200, 400)
    assert found.padding == 0.5 and found.distortion == 1
    assert measured(strategies.Square(fit="squash"), 200, 400).distortion == 0.5


def test_a_crop_keeps_the_middle_and_a_smaller_image_keeps_all():
    assert measured(strategies.Square(100, 10, fit="crop"), 100, 400).kept == 0.25
    assert measured(strategies.Square(100, 10, fit="crop"), 50, 200).kept == 0.25
    assert measured(strategies.Square(100, 10), 50, 100).kept == 1
    assert measured(strategies.Square(100, 10), 200, 200).kept == 0.25


@pytest.mark.parametrize("object_size", [(1, 1), (64, 64), (40, 130), (500, 20)])
@pytest.mark.parametrize(
    "strategy",
    [
        strategies.InternVL(),
        strategies.AnyRes(),
        strategies.UReader(),
        strategies.LLaVAMini(),
        strategies.Square(fit="crop"),
    ],
)
def test_the_chance_of_a_cut_is_what_random_objects_meet(strategy, object_size):
    height, width = 1500, 611
    found = measured(strategy, height, width, object_size)
    rng = np.random.default_rng(0)
    met = np.zeros(40_000, bool)
    for cuts, side, length in zip(
        cuts_of(found.views, height, width), (height, width), object_size, strict=True
    ):
        starts = rng.uniform(0, max(0, side - length), len(met))
        for cut in cuts:
            met |= (starts < cut) & (cut < starts + length)
    assert abs(met.mean() - found.cut) < 0.012


def test_the_chance_is_the_published_formula_for_tiles_of_equal_size():
    found = measured(strategies.InternVL(), 1500, 600)
    rows, columns = 5, 2
    whole = (1 - (columns - 1) * 64 / (600 - 64)) * (1 - (rows - 1) * 64 / (1500 - 64))
    assert found.cut == pytest.approx(1 - whole)


def test_one_view_cuts_nothing_and_padding_is_no_cut():
    for strategy in (strategies.QwenVL(), strategies.Square(fit="pad")):
        assert measured(strategy, 1500, 600).cut == 0
    # The padded canvas of 672x1008 has cuts at 336 and 672 of its height.
    rows, columns = cuts_of(strategies.AnyRes().views(1500, 600), 1500, 600)
    assert len(rows) == 2 and not columns


def test_a_tile_of_filler_has_no_content():
    views = strategies.DeepSeekVL2().views(2000, 10)
    for view in views:
        top, left, bottom, right = view.content
        assert bottom >= top and right >= left
