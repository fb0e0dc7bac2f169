"""The cascade's curve equals a plain one; its ends are the two budgets."""

import numpy as np
import pytest

from navit.evals.cascade import cascade


def drawn(rng, count=41, classes=4):
    x = rng.random((2, count, classes)).round(1) + 0.1  # equal confidences occur
    small, large = x / x.sum(-1, keepdims=True)
    return small, large, rng.integers(0, classes, count)


def test_it_equals_a_plain_one(rng):
    small, large, labels = drawn(rng)
    points = cascade(small, large, labels, small_flops=2.0, large_flops=7.0)
    assert [p.share for p in points] == pytest.approx(
        np.linspace(0, 1, 21), abs=0.51 / 41
    )
    hardest = sorted(range(41), key=lambda i: (small[i].max(), i))
    for share, accuracy, flops in points:
        sent = set(hardest[: round(share * 41)])
        answers = [(large if i in sent else small)[i].argmax() for i in range(41)]
        assert accuracy == pytest.approx(np.mean(answers == labels))
        assert flops == pytest.approx(np.mean([2 + 7 * (i in sent) for i in range(41)]))


def test_the_ends_are_the_two_budgets(rng):
    small, large, labels = drawn(rng)
    first, last = cascade(
        small, large, labels, small_flops=1, large_flops=4, shares=(0, 1)
    )
    assert first == (0, (small.argmax(1) == labels).mean(), 1)
    assert last == (1, (large.argmax(1) == labels).mean(), 5)


def test_sending_the_hardest_is_better_than_a_mixture_of_the_budgets(rng):
    """Where the small budget is right in proportion to its confidence."""
    labels = np.zeros(4000, int)
    confidence = rng.uniform(0.5, 1, 4000)
    right = rng.random(4000) < confidence
    small = np.stack((confidence, 1 - confidence), 1)
    small[~right] = small[~right, ::-1]
    large = np.tile([1.0, 0.0], (4000, 1))
    points = cascade(small, large, labels, small_flops=1, large_flops=4)
    for share, accuracy, _ in points[1:-1]:
        mixture = points[0].accuracy + share * (
            points[-1].accuracy - points[0].accuracy
        )
        assert accuracy > mixture


def test_bad_arguments_are_refused(rng):
    small, large, labels = drawn(rng)
    with pytest.raises(ValueError, match=r"shares \(0, 50\) must be from 0 to 1"):
        cascade(small, large, labels, small_flops=1, large_flops=4, shares=(0, 50))
    with pytest.raises(ValueError, match="give probabilities"):
        cascade(small, 9 * large, labels, small_flops=1, large_flops=4)
    with pytest.raises(ValueError, match="40 images have probabilities and 41"):
        cascade(small, large[:40], labels, small_flops=1, large_flops=4)
