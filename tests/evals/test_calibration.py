"""The calibration error equals a plain one, bin by bin."""

import numpy as np
import pytest

from navit.evals.calibration import calibration_error


def plain(probabilities, labels, bins):
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for b in range(bins):
        inside = [
            (max(p), int(np.argmax(p)) == label)
            for p, label in zip(probabilities, labels, strict=True)
            if edges[b] < max(p) <= edges[b + 1]
        ]
        if inside:
            confidence, hits = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(hits - confidence)
    return total


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_it_equals_a_plain_one(bins, rng):
    for classes in (2, 5, 100):
        p = softmax(3 * rng.standard_normal((300, classes))).astype(np.float32)
        labels = rng.integers(0, classes, 300)
        expected = plain(p.astype(np.float64), labels, bins)
        assert calibration_error(p, labels, bins=bins) == pytest.approx(expected)


def test_confidence_on_an_edge_is_in_the_bin_below():
    """Of four bins, 0.5 and 0.75 are in the second and the third."""
    p = np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]])
    labels = np.array([0, 1, 0])
    for bins, expected in ((2, (0.5 + 0.75) / 3), (4, (0.25 + 1 + 0.5) / 3)):
        assert plain(p, labels, bins) == pytest.approx(expected)
        assert calibration_error(p, labels, bins=bins) == pytest.approx(expected)


def test_labels_drawn_from_the_probabilities_are_calibrated(rng):
    p = softmax(2 * rng.standard_normal((40_000, 4)))
    labels = (p.cumsum(1) < rng.random((len(p), 1))).sum(1)
    assert calibration_error(p, labels) < 0.01
    assert calibration_error(softmax(np.log(p) * 4), labels) > 0.1  # overconfident


def test_extremes(rng):
    labels = rng.integers(0, 3, 50)
    certain = np.eye(3)[labels]
    assert calibration_error(certain, labels) == 0
    assert calibration_error(certain, (labels + 1) % 3) == 1
    one_class = np.ones((50, 1))
    assert calibration_error(one_class, np.zeros(50, int)) == 0


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "0 images have probabilities and 0"),
        (np.full((2, 2), 0.5), np.array([0]), "2 images have probabilities and 1"),
        (np.array([[3.0, -2.0]]), np.array([0]), "smallest value is -2: give prob"),
        (np.array([[0.9, 0.9]]), np.array([0]), "a row sums to 1.8"),
        (np.array([[np.nan, 0.5]]), np.array([0]), "a row sums to nan"),
        (np.array([[0.5, 0.5]]), np.array([-1]), "leave out images without a label"),
        (np.array([[0.5, 0.5]]), np.array([2]), "do not fit 2 classes"),
    ],
)
def test_other_numbers_are_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration_error(probabilities, labels)
