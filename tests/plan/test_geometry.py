"""navit.plan.geometry: SigLIP 2's rule for the grid, on every kind of size."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.plan.geometry import grid_for, grids_for

BUDGETS = (1, 2, 64, 256, 729, 1024)
PATCHES = (14, 16, 32)
ODD_SIZES = [(1, 1), (5, 3000), (3000, 5), (37, 911), (4000, 3000), (1, 65535)]
TOLERANCE = 1e-5  # of the published search


def random_sizes(seed: int, count: int) -> np.ndarray:
    """Sides from 1 to 20,000, small ones as likely as large ones."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, math.log(20_000), (count, 2))).astype(np.int64)
    return np.concatenate([ODD_SIZES, sizes])


def released_rule(height: int, width: int, patch: int, budget: int) -> tuple[int, int]:
    """SigLIP 2's binary search, one image at a time, as in its released code."""

    def patches(side: int, ratio: float) -> int:
        return max(1, math.ceil(side * ratio / patch))

    low, high = TOLERANCE / 10, 100.0
    while high - low >= TOLERANCE:
        ratio = (low + high) / 2
        if patches(height, ratio) * patches(width, ratio) <= budget:
            low = ratio
        else:
            high = ratio
    return patches(height, low), patches(width, low)


def check(sizes: np.ndarray, grids: np.ndarray, budget: int) -> None:
    rows, columns = grids.astype(np.int64).T
    height, width = sizes.T
    assert (grids >= 1).all()
    assert (rows * columns <= budget).all()
    # One scale explains both sides: ((rows-1) p/h, rows p/h] and the same of the width
    # meet. In integers; the clamp at 1 opens an interval down to zero.
    assert ((rows - 1) * width < columns * height).all()
    assert ((columns - 1) * height < rows * width).all()


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_grids_fit_the_budget_keep_the_aspect_and_are_the_largest(budget, patch):
    sizes = random_sizes(budget * patch, 2000)
    grids = grids_for(sizes, budget, patch_size=patch)
    check(sizes, grids, budget)
    # The scales that give this grid end at `top`; a little above, it must not fit,
    # unless the search was stopped by its own largest scale.
    top = (grids * patch / sizes).min(-1)
    above = np.ceil(sizes * (top + 2 * TOLERANCE)[:, None] / patch).prod(-1)
    assert ((above > budget) | (top >= 100 - TOLERANCE)).all()


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 100_000),
    width=st.integers(1, 100_000),
    patch=st.sampled_from(PATCHES),
    budget=st.integers(1, 4096),
    cap=st.none() | st.floats(0.01, 10),
)
def test_any_single_image(height, width, patch, budget, cap):
    grid = grid_for(height, width, patch_size=patch, max_tokens=budget, max_upscale=cap)
    check(np.array([[height, width]]), np.array([grid]), budget)
    if cap is None:
        assert grid == released_rule(height, width, patch, budget)
    else:
        free = grid_for(height, width, patch_size=patch, max_tokens=budget)
        assert grid[0] <= free[0] and grid[1] <= free[1]
        assert grid[0] <= max(1, math.ceil(height * cap / patch))
        assert grid[1] <= max(1, math.ceil(width * cap / patch))


@pytest.mark.parametrize("patch", PATCHES)
def test_many_at_once_are_the_published_rule_one_by_one(patch):
    sizes = random_sizes(patch, 400)
    budgets = np.random.default_rng(patch).choice(BUDGETS, len(sizes))
    grids = grids_for(sizes, budgets, patch_size=patch)
    for (height, width), budget, grid in zip(sizes, budgets, grids, strict=True):
        expected = released_rule(int(height), int(width), patch, int(budget))
        assert tuple(grid.tolist()) == expected


@pytest.mark.parametrize("budget", BUDGETS)
def test_without_upscaling_an_image_is_never_enlarged_beyond_its_last_patch(budget):
    sizes = random_sizes(budget, 2000)
    native = -(-sizes // 16)
    grids = grids_for(sizes, budget, max_upscale=1.0)
    check(sizes, grids, budget)
    assert (grids <= native).all()
    # And an image whose own size fits the budget keeps it.
    fits = native.prod(-1) <= budget
    assert fits.any()
    np.testing.assert_array_equal(grids[fits], native[fits])


def test_a_square_takes_the_square_root_of_the_budget():
    for budget in (64, 256, 729, 1024):
        side = math.isqrt(budget)
        assert grid_for(500, 500, max_tokens=budget) == (side, side)


def test_an_image_and_its_transpose_have_transposed_grids():
    sizes = random_sizes(5, 500)
    one, other = grids_for(sizes, 256), grids_for(sizes[:, ::-1], 256)
    np.testing.assert_array_equal(one, other[:, ::-1])


def test_no_images_have_no_grids():
    assert grids_for(np.zeros((0, 2), np.int64), 256).shape == (0, 2)


@pytest.mark.parametrize("size", [(1, 2**27), (2**27, 1)])
def test_an_image_too_long_for_the_smallest_scale_does_not_break_the_budget(size):
    # 2^27 pixels pass the pixel limit, and the search starts at a scale of 1e-6.
    try:
        rows, columns = grid_for(*size, max_tokens=4)
    except ValueError as error:
        assert "4" in str(error)
    else:
        assert rows * columns <= 4


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ((0, 5), {}, "0x5"),
        ((5, -3), {}, "5x-3"),
        ((5, 5), {"max_tokens": 0}, "max_tokens.*0"),
        ((5, 5), {"patch_size": 0}, "patch_size.*0"),
        ((5, 5), {"max_upscale": 0.0}, "max_upscale.*0"),
        ((5, 5), {"max_upscale": -1.0}, "max_upscale.*-1"),
    ],
)
def test_what_has_no_grid_is_refused_by_value(size, options, words):
    with pytest.raises(ValueError, match=words):
        grid_for(*size, **options)
