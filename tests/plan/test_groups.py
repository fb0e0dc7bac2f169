"""navit.plan.groups: rows in groups that hold about as many images each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit.plan.groups import captions_for, cut, row_order

# Images per row at NaFlex lengths, for rows of 1024 and of 4096 tokens.
SHORT = [1] * 540 + [2] * 260 + [3] * 190 + [4] * 10
LONG = np.random.default_rng(0).binomial(40, 0.18, 1000) + 1


def sums(counts, order, group):
    whole = len(counts) // group * group
    return np.asarray(counts)[order[:whole]].reshape(-1, group).sum(1)


@given(
    counts=st.lists(st.integers(0, 9), max_size=40),
    group=st.sampled_from([None, 1, 2, 3, 8]),
)
def test_an_order_of_rows_holds_each_once(counts, group):
    order = row_order(np.random.default_rng(0), np.array(counts, int), group)
    assert sorted(order.tolist()) == list(range(len(counts)))


@pytest.mark.parametrize("counts", [SHORT, LONG], ids=["short", "long"])
def test_groups_of_rows_hold_about_as_many_images(counts):
    counts = np.array(counts)
    found = sums(counts, row_order(np.random.default_rng(0), counts, 8), 8)
    assert np.ptp(found) <= 4
    # And neither the groups nor the rows in one are in order of their images.
    order = row_order(np.random.default_rng(0), counts, 8)[:1000]
    firsts = counts[order].reshape(-1, 8)
    assert abs(np.corrcoef(np.arange(1000), counts[order])[0, 1]) < 0.1
    assert np.ptp(firsts.mean(0)) < 1.2
    other = row_order(np.random.default_rng(1), counts, 8)
    assert (order != other[:1000]).mean() > 0.9


def test_what_is_over_is_cut_from_the_fullest_rows():
    rows = [[1], [2, 3, 4, 5], [6, 7, 8], [9], [10], [11, 12, 13]]
    assert cut(rows, 2, 3) == [[1], [2, 3], [6, 7], [9], [10], [11, 12]]
    assert rows[1] == [2, 3, 4, 5]
    assert cut(rows, 4, 9) == rows
    assert cut(rows, 4, 1)[4:] == [[10], []] or cut(rows, 4, 1)[4:] == [[], [11]]
    assert cut([], 2, 3) == []


def test_places_are_a_little_more_than_the_mean_and_hardly_leave_out_any():
    for counts, group in [(SHORT, 4), (SHORT, 8), (LONG, 4), (LONG, 8)]:
        counts = np.array(counts)
        places = captions_for(counts, group)
        found = sums(counts, row_order(np.random.default_rng(3), counts, group), group)
        assert counts.mean() * group / places > 0.9
        assert np.maximum(found - places, 0).sum() <= 5e-4 * counts.sum()
    # A row in its own group needs as many as the fullest; 61 is rounded to 64, 9 is not
    # rounded to 16.
    assert captions_for(np.array(SHORT), 1) == 4
    assert captions_for(np.full(80, 15), 4) == 64
    assert captions_for(np.full(80, 4), 2) == 9
