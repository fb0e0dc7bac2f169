"""Lanes pad hardly more than one order of all images, and mix shards nearly as well."""

import re

import pytest

from navit.bench import lane_speed


@pytest.mark.slow
def test_lanes_pad_little_more_and_mix_shards(capsys):
    """The bounds are those of 64 lanes of NaFlex's budgets in rows of 4096."""
    lane_speed.padding(150_000, 64)
    printed = capsys.readouterr().out
    one, lanes = (
        [float(x) for x in re.findall(r"([\d.]+)%", line)]
        for line in printed.splitlines()
        if line.startswith(("one order", "64 lanes"))
    )
    padding, left_out, same_shard = range(3)
    assert lanes[padding] <= one[padding] + 0.2
    assert lanes[left_out] < 5  # few images: lanes have 18 chunks each
    (random,) = map(float, re.findall(r"order, ([\d.]+)% of the pairs", printed))
    assert abs(one[same_shard] - random) < 0.02
    assert lanes[same_shard] <= 2 * random
