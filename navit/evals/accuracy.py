"""Accuracy of class scores, and how well it is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from navit.evals.calibration import calibration_error
from navit.evals.metric import Metric
from navit.sources.source import Task


class Confidences(NamedTuple):
    """Class probabilities `[m, c]` and labels `[m]` of the images `places` `[m]`."""

    probabilities: np.ndarray
    labels: np.ndarray
    places: np.ndarray


class PerClass(NamedTuple):
    """Top-1 accuracy of the images of one class, and how many they are."""

    accuracy: float
    images: int


class Classification:
    """Accuracy of class scores on a task.

    Args:
      scores: vectors `[m, d]` -> class scores `[m, c]`; the largest is the answer.
      task: class names and labels (-1: the image does not count).
      logits: vectors `[m, d]` -> logits `[m, c]`, of which the softmax is the model's
        confidence. None: the scores are logits.

    Raises:
      ValueError: for a label beyond the class names.
    """

    def __init__(
        self,
        scores: Callable[[np.ndarray], np.ndarray],
        task: Task,
        *,
        logits: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        most = task.labels.max(initial=-1)
        if most >= len(task.class_names):
            raise ValueError(
                f"{len(task.class_names)} class names do not fit the label {most}: "
                f"labels count from 0, so they need at least {most + 1} names"
            )
        self._scores, self._task, self._logits = scores, task, logits or scores

    def run(self, images: np.ndarray) -> Iterator[Metric]:
        """Yields metrics of vectors `[len(source), d]`; none if no image counts.

        A row of NaN is an image that could not be read; it does not count.
        """
        confidences = self.confidences(images)
        if len(confidences.labels):
            scores = self._scores(images[confidences.places])
            yield from accuracies(scores, confidences.labels)
            error = calibration_error(confidences.probabilities, confidences.labels)
            yield Metric("calibration_error", error, len(scores))

    def confidences(self, images: np.ndarray) -> Confidences:
        """The probabilities of the images that count, of vectors as in `run`."""
        labels = self._task.labels[: len(images)]
        places = np.flatnonzero(counts(images, labels))
        return Confidences(
            softmax(self._logits(images[places])), labels[places].astype(int), places
        )

    def per_class(self, images: np.ndarray) -> dict[str, PerClass]:
        """Top-1 accuracy of each class that has an image, by its name. As in `run`."""
        _, labels, places = self.confidences(images)
        names = self._task.class_names
        first = ranks(self._scores(images[places]), labels) == 0
        hits, of = (np.bincount(x, None, len(names)) for x in (labels[first], labels))
        return {
            names[i]: PerClass(float(hits[i] / of[i]), int(of[i]))
            for i in np.flatnonzero(of)
        }


def counts(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which vectors `[m, d]` count, `[m]`: labelled (not -1), and not NaN."""
    return (labels >= 0) & ~np.isnan(vectors[:, 0])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes: `[m, c]` -> `[m, c]`."""
    logits = np.asarray(logits, np.float32)
    values = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
    return values / values.sum(1, keepdims=True)


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one: `[m, c]`, `[m]` -> `[m]`.

    Among classes with equal scores, the lower one comes first.
    """
    own = np.take_along_axis(scores, labels[:, None], 1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(1)


def accuracies(scores: np.ndarray, labels: np.ndarray) -> Iterator[Metric]:
    """Yields top-1 accuracy of scores `[m, c]`; top-5 of more than five classes."""
    rank, classes = ranks(scores, labels), scores.shape[1]
    for name, k in (("accuracy", 1), ("top5", 5)):
        if k == 1 or k < classes:
            yield Metric(name, float((rank < k).mean()), len(rank), k / classes)
