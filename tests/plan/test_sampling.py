"""navit.plan.sampling: the draws for every image have the right distribution."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.config import Crop, DataConfig, Sides, TokenDrop
from navit.plan import sampling


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 5))
def test_a_shuffle_is_a_permutation_in_any_pieces(count, seed):
    whole = sampling.shuffled(np.arange(count), count, [seed])
    assert sorted(whole.tolist()) == list(range(count))
    middle = np.arange(count // 3, count)
    np.testing.assert_array_equal(
        sampling.shuffled(middle, count, [seed]), whole[middle]
    )


def test_a_shuffle_looks_random():
    """Where position 7 of 50 lands over 5000 keys: chi squared of 49 degrees."""
    landed = [int(sampling.shuffled(np.array([7]), 50, [k])[0]) for k in range(5000)]
    counts = np.bincount(landed, minlength=50)
    assert ((counts - 100) ** 2 / 100).sum() < 99  # p = 3e-5
    # And neighbours do not stay neighbours.
    order = sampling.shuffled(np.arange(100_000), 100_000, [0])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.015


def test_a_billion_images_cost_what_the_block_costs():
    found = sampling.shuffled(np.arange(10**9 - 1000, 10**9), 10**9, [3])
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0 and found.max() < 10**9
    assert found.max() - found.min() > 9e8


def test_budgets_get_their_exact_share():
    data = DataConfig(budgets=(64, 256), budget_weights=(1.0, 3.0))
    found = sampling.token_budgets(np.random.default_rng(0), 1000, data, 16)
    assert [(found == b).sum() for b in (64, 256)] == [250, 750]
    assert (np.diff(found) != 0).sum() > 200  # and are mixed


@pytest.mark.parametrize("of", ["side", "area"])
@pytest.mark.parametrize("distribution", ["uniform", "truncated_normal"])
def test_sides_follow_their_distribution(of, distribution):
    sides = Sides(of=of, distribution=distribution)
    data = DataConfig(sides=sides, row_tokens=1024)
    tokens = sampling.token_budgets(np.random.default_rng(0), 200_000, data, 1)
    drawn = np.sqrt(tokens)
    if of == "area":
        drawn = drawn**2
    low, high = (64, 384) if of == "side" else (64**2, 384**2)
    share = (drawn - low) / (high - low)
    assert share.min() > -0.001 and share.max() <= 1
    # The mean of N(-0.5, 1) cut to [-1, 1]: its ends are at -0.5 and 1.5 deviations.
    normal = NormalDist()
    mass = normal.cdf(1.5) - normal.cdf(-0.5)
    cut = -0.5 + (normal.pdf(-0.5) - normal.pdf(1.5)) / mass
    mean = 0.5 if distribution == "uniform" else (1 + cut) / 2
    np.testing.assert_allclose(share.mean(), mean, atol=0.003)
    assert data.most_tokens(16) == 24 * 24


def test_crops_lie_within_their_image_and_in_their_range():
    sizes = np.random.default_rng(1).integers(1, 900, (5000, 2))
    crop = Crop(area=(0.25, 0.5), aspect=(0.8, 1.25))
    boxes = sampling.crop_boxes(np.random.default_rng(0), sizes, crop)
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    large = sizes.min(-1) > 100
    area = boxes[large, 2:].prod(-1) / sizes[large].prod(-1)
    assert area.min() > 0.24 and area.max() < 0.51
    assert abs(area.mean() - 0.375) < 0.01
    aspect = boxes[large, 3] / boxes[large, 2] / (sizes[large, 1] / sizes[large, 0])
    assert aspect.min() > 0.78 and aspect.max() < 1.28


def kept_share(drop, lengths=1000, seen=0, count=20_000):
    lengths = np.broadcast_to(lengths, count)
    kept = sampling.kept_tokens(
        np.random.default_rng(0), lengths, drop, seen=np.full(count, seen), longest=1000
    )
    return kept / lengths


def test_constant_drop_keeps_the_same_share_of_all():
    assert set(kept_share(TokenDrop(kind="constant", rate=0.25, final_rate=0.25))) == {
        0.75
    }


def test_beta_drop_has_its_mean_and_variance():
    dropped = 1 - kept_share(TokenDrop(kind="beta", rate=0.3, final_rate=0.3, most=0.6))
    assert dropped.max() <= 0.6
    u = dropped / 0.6
    np.testing.assert_allclose(u.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(u.var(), 0.3 * 0.25, atol=0.003)


def test_long_images_drop_more_under_the_resolution_rule():
    drop = TokenDrop(kind="resolution", rate=0.5, final_rate=0.5, delta=0.2)
    for length, mean in ((1000, 0.7), (500, 0.5), (10_000 // 100, 0.34)):
        dropped = 1 - kept_share(drop, lengths=length)
        np.testing.assert_allclose(dropped.mean(), mean, atol=0.006)
        assert np.abs(dropped - mean).max() < 0.04 + 1 / length


def test_the_rate_follows_a_sigmoid_of_the_images_seen():
    drop = TokenDrop(
        kind="constant", rate=0.8, final_rate=0.2, midpoint=1e6, timescale=1e5
    )
    for seen, rate in ((0, 0.8), (1e6, 0.5), (1.1e6, 0.361), (2e6, 0.2)):
        np.testing.assert_allclose(
            1 - kept_share(drop, seen=seen, count=3), rate, atol=2e-3
        )


def test_no_image_loses_all_its_tokens():
    drop = TokenDrop(kind="constant", rate=0.99, final_rate=0.99)
    assert kept_share(drop, lengths=3, count=5).min() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: Sides(mean=2.0, std=0.2), "mean=2.0 and std=0.2 has hardly any mass"),
        (lambda: Sides(low=300, high=200), "high=200 is less than low=300"),
        (lambda: Crop(area=(0.5, 1.5)), "area must be a range"),
        (lambda: TokenDrop(rate=0.05, final_rate=0.5), "delta=0.1 takes rates"),
        (lambda: TokenDrop(midpoint=float("nan")), "midpoint"),
        (lambda: TokenDrop(kind="beta", rate=0.9), r"rate must be in \[0, 0.85\)"),
        (lambda: DataConfig(budget_weights=(1.0, 2.0)), "one positive number for each"),
        (lambda: DataConfig(budget_weights=(float("nan"),)), "one positive number"),
        (lambda: DataConfig(seed=-1), "seed must be 0 or more, not -1"),
        (lambda: DataConfig(elastic=1.0), "elastic must be a share"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_value(options, words):
    with pytest.raises(ValueError, match=words):
        options()
