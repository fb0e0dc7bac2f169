"""navit.plan.packing: lengths into rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.plan.geometry import grids_for
from navit.plan.packing import expected_waste, pack


def plain_best_fit(lengths, row_tokens, open_rows, max_images):
    """The rule for few lengths; of rows with equal room, the oldest is taken."""
    opened: list[list[int]] = []
    closed = []

    def room(row: list[int]) -> int:
        return row_tokens - sum(lengths[i] for i in row)

    for index, length in enumerate(lengths):
        fitting = [row for row in opened if room(row) >= length]
        if fitting:
            row = min(fitting, key=room)
        else:
            if len(opened) == open_rows:
                fullest = min(opened, key=room)
                opened.remove(fullest)
                closed.append(fullest)
            row = []
            opened.append(row)
        row.append(index)
        if room(row) == 0 or len(row) == max_images:
            opened.remove(row)
            closed.append(row)
    return closed + opened


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), max_size=120),
    row_tokens=st.integers(8, 24),  # short, so that rows often come out full
    open_rows=st.integers(1, 6),
    max_images=st.none() | st.integers(1, 5),
)
def test_rows_follow_the_stated_rule_and_stay_within_their_limits(
    lengths, row_tokens, open_rows, max_images
):
    rows, _ = pack(lengths, row_tokens, open_rows=open_rows, max_images=max_images)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert row == sorted(row)
        assert 0 < sum(lengths[i] for i in row) <= row_tokens
        assert max_images is None or len(row) <= max_images
    assert rows == plain_best_fit(lengths, row_tokens, open_rows, max_images)


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_length_that_no_row_holds_is_refused_by_number_and_value(length):
    with pytest.raises(ValueError, match=f"image 2 has {length} tokens.*10"):
        pack([3, 10, length, 4], 10)


def test_nothing_packs_into_nothing():
    assert pack([], 10) == ([], {})


def padding(lengths: list[int], row_tokens: int, open_rows: int) -> float:
    rows, _ = pack(lengths, row_tokens, open_rows=open_rows)
    return 1 - sum(lengths) / (len(rows) * row_tokens)


def test_photographs_in_rows_of_4096_waste_little():
    # 20,000 photographs of 0.3 to 9 megapixels, 2:3 to 3:2 for two thirds of them.
    rng = np.random.default_rng(0)
    height = rng.choice([480, 640, 768, 1024, 1200, 2048, 3000], 20_000)
    width = height * np.exp(rng.normal(0, 0.35, len(height)))
    sizes = np.stack([height, width.astype(np.int64)], -1)
    lengths = grids_for(sizes, 1024).prod(-1).tolist()
    assert padding(lengths, 4096, 16) < 0.013
    # Without enlarging, lengths differ more and pack better still.
    native = grids_for(sizes // 4, 1024, max_upscale=1.0).prod(-1).tolist()
    assert padding(native, 4096, 16) < 0.008
    # Open rows make the difference.
    assert padding(native, 4096, 16) < padding(native, 4096, 1) / 2


def test_many_lengths_pack_better_than_by_best_fit():
    """By a third at NaFlex lengths in rows of 4096 (`navit.bench.plan`)."""
    rng = np.random.default_rng(0)
    sizes = np.stack([np.full(20_000, 480), rng.integers(320, 720, 20_000)], -1)
    budgets = rng.choice([128, 256, 576, 784, 1024], 20_000)
    lengths = grids_for(sizes, budgets).prod(-1).tolist()
    plain = plain_best_fit(lengths[:4000], 4096, 16, None)
    lost = 1 - sum(lengths[:4000]) / (len(plain) * 4096)
    assert padding(lengths[:4000], 4096, 16) < 0.9 * lost


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(60, 300), st.none() | st.integers(2, 9))
def test_many_lengths_are_all_packed_once_within_bounds(seed, row_tokens, max_images):
    rng = np.random.default_rng(seed)
    lengths = rng.choice(rng.integers(1, 60, 8), 1500).tolist()
    rows, _ = pack(lengths, row_tokens, open_rows=6, max_images=max_images)
    assert sorted(i for row in rows for i in row) == list(range(1500))
    for row in rows:
        assert sum(lengths[i] for i in row) <= row_tokens
        assert max_images is None or len(row) <= max_images


def test_expected_waste_of_one_length_is_what_cannot_be_filled():
    """Multiples of 10 are filled; of other rooms the remainder is left."""
    waste = expected_waste([10] * 2000, 45)
    assert (np.round(waste / 1000) == np.arange(46) % 10)[:31].all()
