"""The check of the kernel of rotary positions finds it right, and finds it wrong."""

import numpy as np
import pytest
from helpers import tiny_config

from navit.config import override
from navit.kernels import turn as kernel
from navit.train.comparison import DIFFERS, OK, SKIPPED, verdicts
from navit.train.turn_case import turn_case

IDS = np.repeat(np.int32([[1, 2, 0, 0], [1, 1, 1, 1]]), 32, axis=1)


def case(*overrides, only_used=False):
    config = override(tiny_config(), ["model.vision.rotary.kind=axial"])
    config = override(config, overrides)
    return turn_case(config, IDS, tensor=1, only_used=only_used)


def outcome(*overrides):
    (verdict,) = verdicts(case(*overrides), timed=False)
    return verdict.outcome


def test_a_right_kernel_and_a_wrong_one(monkeypatch):
    assert outcome() == OK
    right = kernel.tables
    monkeypatch.setattr(kernel, "tables", lambda cos, sin, h: right(cos, -sin, h))
    assert outcome() == DIFFERS


@pytest.mark.parametrize(
    "setting",
    ["model.fused=false", "model.vision.num_heads=4"],  # heads of 4 channels
)
def test_a_kernel_that_is_not_used_is_not_checked(setting):
    assert outcome(setting) == SKIPPED
    assert case(setting, only_used=True) is None


def test_towers_without_fixed_frequencies_have_no_case():
    assert case("model.vision.rotary=none") is None
    assert case("model.vision.rotary.kind=mixed") is None
