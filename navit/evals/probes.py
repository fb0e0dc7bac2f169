"""Probes of frozen features: k nearest neighbours and logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from navit.evals.accuracy import counts
from navit.evals.metric import Metric
from navit.evals.nearest import nearest
from navit.sources.source import Task


class Labelled(NamedTuple):
    """Feature vectors `[m, d]` and their classes `[m]`."""

    vectors: np.ndarray
    labels: np.ndarray


def labelled(
    features: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray | Sequence[np.ndarray],
) -> Labelled:
    """Lists the vectors that have a label (not -1) and are not NaN.

    Args:
      features: pooled vectors `[m, d]`; or dense features, a `[rows, columns, d]` array
        an image.
      labels: `[m]`; or a class per token, a `[rows, columns]` array an image.

    Raises:
      ValueError: if features and labels do not match, or no vector is left.
    """
    shapes = [f.shape[:-1] for f in features], [np.shape(x) for x in labels]
    for index, (own, given) in enumerate(zip(*shapes, strict=False)):
        if own != given:
            raise ValueError(
                f"features {index} have the shape {own} and their labels {given}: give "
                "one label for each vector"
            )
    if len(features) != len(labels):
        raise ValueError(
            f"{len(features)} features and {len(labels)} labels: give one for each"
        )
    width = features[0].shape[-1] if len(features) else 0
    vectors = np.concatenate(
        [f.reshape(-1, width) for f in features] or [np.zeros((0, 1))]
    )
    classes = np.concatenate([np.reshape(x, -1) for x in labels] or [np.zeros(0, int)])
    counted = counts(vectors, classes)
    if not counted.any():
        raise ValueError(f"none of the {len(vectors)} vectors has a label (-1: none)")
    return Labelled(vectors[counted], classes[counted])


class Probe:
    """Accuracy of a probe on a task.

    Args:
      predict: training vectors and vectors `[q, d]` -> classes `[q]`.
      task: class names, and the labels of the images to test on.
      train_labels: the classes of the training images; -1: none.
    """

    def __init__(
        self,
        predict: Callable[[Labelled, np.ndarray], np.ndarray],
        task: Task,
        train_labels: np.ndarray,
    ) -> None:
        self._predict, self._task, self._train_labels = predict, task, train_labels

    def run(self, images: np.ndarray, train: np.ndarray) -> Iterator[Metric]:
        """Yields the accuracy on vectors `[m, d]`, after training vectors `[t, d]`.

        A row of NaN is an image that could not be read; it does not count.
        """
        labels = self._task.labels[: len(images)]
        counted = counts(images, labels)
        if counted.any():
            learned = labelled(train, self._train_labels[: len(train)])
            predicted = self._predict(learned, images[counted])
            hits = float((predicted == labels[counted]).mean())
            chance = 1 / len(self._task.class_names)
            yield Metric("accuracy", hits, int(counted.sum()), chance)


def nearest_neighbours(
    train: Labelled, vectors: np.ndarray, *, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """The class that the k nearest training vectors vote for, `[q]`.

    Nearest by cosine. A vote weighs exp(cosine / temperature), as in Wu et al. 2018
    (arXiv 1805.01978) and DINO; among equal classes, the lowest wins.

    Args:
      vectors: `[q, d]`.
      k: at most the number of training vectors.
    """
    cosines, index = nearest(_unit(vectors), _unit(train.vectors), k=k)
    # Relative to the nearest, so that no weight overflows.
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    votes = np.zeros((len(vectors), train.labels.max() + 1))
    np.add.at(votes, (np.arange(len(votes))[:, None], train.labels[index]), weights)
    return votes.argmax(1)


def logistic_regression(
    train: Labelled, vectors: np.ndarray, *, c: float = 1.0
) -> np.ndarray:
    """The class that a linear probe predicts, `[q]`.

    scikit-learn's logistic regression (L2, L-BFGS) on features scaled to mean 0 and
    variance 1 over the training vectors, so that `c` means the same for every model.

    Args:
      vectors: `[q, d]`.
      c: the inverse of the strength of regularisation.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: if all training vectors are of one class.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "the logistic probe needs scikit-learn: pip install scikit-learn"
        ) from error
    if (train.labels == train.labels[0]).all():
        raise ValueError(
            f"all {len(train.labels)} training vectors are of class {train.labels[0]}: "
            "a linear probe needs two classes or more"
        )
    mean, deviation = train.vectors.mean(0), train.vectors.std(0)
    deviation[deviation == 0] = 1
    probe = LogisticRegression(C=c, tol=1e-6, max_iter=1000)
    probe.fit((train.vectors - mean) / deviation, train.labels)
    return probe.predict((vectors - mean) / deviation)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
