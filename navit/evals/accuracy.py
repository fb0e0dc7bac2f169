"""Accuracy of the model's own class logits."""

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
        self._classify, self._metric, self._task = classify, f"{name}_accuracy", task

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by metric name."""
        return {self._metric: 1 / len(self._task.class_names)}

    def run(self, images: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, accuracy) for pooled vectors `[len(source), e]`.

        A row of NaN is an image that could not be read; it does not count.
        """
        labels = self._task.labels[: len(images)]
        counted = (labels >= 0) & ~np.isnan(images[:, 0])
        if counted.any():
            hit = self._classify(images[counted]).argmax(-1) == labels[counted]
            yield self._metric, float(hit.mean())
