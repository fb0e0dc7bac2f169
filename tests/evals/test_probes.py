"""Probes equal plain references, on pooled and on dense features."""

import sys

import numpy as np
import pytest

from navit.config import MeshConfig
from navit.evals.probes import (
    Labelled,
    labelled,
    logistic_regression,
    nearest_neighbours,
)
from navit.sharding import make_mesh, use_mesh


def clusters(rng, count, classes=4, width=6, spread=1.5):
    """Overlapping clusters, the same for every call."""
    centres = 2 * np.random.default_rng(1).standard_normal((classes, width))
    labels = rng.integers(0, classes, count)
    noise = spread * rng.standard_normal((count, width))
    return Labelled((centres[labels] + noise).astype(np.float32), labels)


def plain_votes(train, vector, k, temperature):
    cosines = [
        vector @ x / np.linalg.norm(vector) / np.linalg.norm(x) for x in train.vectors
    ]
    votes = dict.fromkeys(range(train.labels.max() + 1), 0.0)
    for i in sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]:
        votes[train.labels[i]] += np.exp(cosines[i] / temperature)
    return votes


@pytest.mark.parametrize("devices", [1, 8])
def test_nearest_neighbours_equal_plain_ones(devices, rng):
    train, test = clusters(rng, 150), clusters(rng, 40)
    mesh, _ = make_mesh(MeshConfig(data=devices, fsdp=1))
    with use_mesh(mesh):
        for k, temperature in ((1, 0.07), (20, 0.07), (20, 10.0), (150, 0.5)):
            found = nearest_neighbours(
                train, test.vectors, k=k, temperature=temperature
            )
            for vector, label in zip(test.vectors, found, strict=True):
                votes = plain_votes(train, vector, k, temperature)
                assert votes[label] == pytest.approx(max(votes.values()), rel=1e-4)


def test_a_near_vote_weighs_more_at_a_low_temperature():
    vectors = np.array([[1, 0], [1, 0.6], [1, 0.7]], np.float32)
    train = Labelled(vectors, np.array([1, 0, 0]))
    query = np.array([[5.0, 0.0]])
    assert nearest_neighbours(train, query, k=3, temperature=0.07).tolist() == [1]
    assert nearest_neighbours(train, query, k=3, temperature=10.0).tolist() == [0]
    assert nearest_neighbours(train, query, k=1, temperature=10.0).tolist() == [1]


def plain_logistic(x, labels, classes, c):
    """Newton's method on the sum of losses and |w|^2 / 2c, without the intercept's."""
    x = np.concatenate((x, np.ones((len(x), 1))), 1)
    width = x.shape[1]
    weights = np.zeros((width, classes))
    penalty = np.ones((width, classes)) / c
    penalty[-1] = 1e-9  # the intercepts are free; their sum has no meaning
    hot = np.eye(classes)[labels]
    for _ in range(30):
        z = x @ weights
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - hot) + penalty * weights
        inner = p[:, :, None] * np.eye(classes) - p[:, :, None] * p[:, None]
        hessian = np.einsum("ni,nkl,nj->ikjl", x, inner, x).reshape(width * classes, -1)
        hessian += np.diag(penalty.reshape(-1))
        step = np.linalg.solve(hessian, gradient.reshape(-1))
        weights -= step.reshape(weights.shape)
    return weights


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_the_logistic_probe_equals_a_plain_one(c, rng):
    train, test = clusters(rng, 200), clusters(rng, 300)
    # Scales and means that differ by feature change nothing.
    scale, shift = np.array([1, 10, 0.1, 1, 5, 1]), np.array([0, 3, 0, -8, 0, 1])
    found = logistic_regression(
        Labelled(train.vectors * scale + shift, train.labels),
        test.vectors * scale + shift,
        c=c,
    )
    mean, deviation = train.vectors.mean(0), train.vectors.std(0)
    weights = plain_logistic((train.vectors - mean) / deviation, train.labels, 4, c)
    x = (test.vectors - mean) / deviation
    logits = np.concatenate((x, np.ones((300, 1))), 1) @ weights
    own = np.take_along_axis(logits, found[:, None], 1)[:, 0]
    # L-BFGS stops early: only where two classes are nearly equal may it differ.
    assert (logits.max(1) - own < 1e-3).all()
    assert (found == test.labels).mean() > 0.7


def test_a_constant_feature_does_not_matter(rng):
    train, test = clusters(rng, 100), clusters(rng, 50)
    found = logistic_regression(train, test.vectors)
    wider = [
        np.pad(x, ((0, 0), (0, 1)), constant_values=3) for x in (train[0], test[0])
    ]
    again = logistic_regression(Labelled(wider[0], train.labels), wider[1])
    np.testing.assert_array_equal(again, found)


def test_dense_features_are_listed_token_by_token(rng):
    grids = [(2, 3), (1, 4), (3, 3)]
    features = [rng.standard_normal((*grid, 5)) for grid in grids]
    labels = [rng.integers(-1, 3, grid) for grid in grids]
    features[1][0, 2] = np.nan
    found = labelled(features, labels)
    expected = [
        (f[at], y[at])
        for f, y in zip(features, labels, strict=True)
        for at in np.ndindex(y.shape)
        if y[at] >= 0 and not np.isnan(f[at]).any()
    ]
    np.testing.assert_array_equal(found.vectors, [f for f, _ in expected])
    np.testing.assert_array_equal(found.labels, [y for _, y in expected])


def test_pooled_features_are_listed_without_the_unlabelled_and_unreadable(rng):
    features, labels = rng.standard_normal((5, 3)), np.array([0, -1, 2, 1, 0])
    features[3] = np.nan
    found = labelled(features, labels)
    np.testing.assert_array_equal(found.vectors, features[[0, 2, 4]])
    assert found.labels.tolist() == [0, 2, 0]


def test_bad_features_are_one_clear_line(rng, monkeypatch):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="4 features and 3 labels"):
        labelled(x, np.zeros(3, int))
    with pytest.raises(
        ValueError, match=r"features 1 have the shape \(2, 2\) and .*\(4"
    ):
        labelled([x.reshape(2, 2, 3)] * 2, [np.zeros((2, 2), int), np.zeros(4, int)])
    with pytest.raises(ValueError, match="none of the 4 vectors has a label"):
        labelled(x, np.full(4, -1))
    with pytest.raises(ValueError, match="none of the 0 vectors"):
        labelled([], [])
    same = Labelled(x, np.full(4, 2))
    with pytest.raises(ValueError, match="all 4 training vectors are of class 2"):
        logistic_regression(same, x)
    with pytest.raises(ValueError, match="k=20 must be from 1 to 4"):
        nearest_neighbours(same, x)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        logistic_regression(same, x)
