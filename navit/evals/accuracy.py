"""Accuracy of class scores, and that of the model's own class logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from navit.sources.source import Task


class Classification:
    """Accuracy on the task that a model was trained to classify.

    Args:
      classify: pooled vectors `[m, e]`, before normalisation, -> class logits `[m, c]`.
    """

    def __init__(
        self, classify: Callable[[np.ndarray], np.ndarray], name: str, task: Task
    ) -> None:
        self._classify, self._name, self._task = classify, name, task

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by metric name."""
        return chance(self._name, len(self._task.class_names))

    def run(self, images: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, accuracy) for pooled vectors `[len(source), e]`.

        A row of NaN is an image that could not be read; it does not count.
        """
        labels = self._task.labels[: len(images)]
        counted = counts(images, labels)
        if counted.any():
            yield from accuracies(
                self._name, self._classify(images[counted]), labels[counted]
            )


def counts(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which vectors `[m, d]` count, `[m]`: labelled (not -1), and not NaN."""
    return (labels >= 0) & ~np.isnan(vectors[:, 0])


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one: `[m, c]`, `[m]` -> `[m]`.

    Of classes with equal scores, the lower one comes first.
    """
    own = np.take_along_axis(scores, labels[:, None], 1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(1)


def accuracies(
    name: str, scores: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[str, float]]:
    """Yields top-1 accuracy of scores `[m, c]`; top-5 of more than five classes."""
    rank = ranks(scores, labels)
    for metric, k in _metrics(name, scores.shape[1]).items():
        yield metric, float((rank < k).mean())


def chance(name: str, classes: int) -> dict[str, float]:
    """Accuracy of guessing, by metric name."""
    return {metric: k / classes for metric, k in _metrics(name, classes).items()}


def _metrics(name: str, classes: int) -> dict[str, int]:
    return {f"{name}_accuracy": 1, **({f"{name}_top5": 5} if classes > 5 else {})}
