"""Zero-shot classification: the class whose prompts are nearest to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from navit.evals import accuracy
from navit.sources.source import Task


class ZeroShot:
    """Accuracy on each task of a source.

    Attributes:
      classifiers: a unit vector for each class, `[classes, e]`, by task name.
        `embedder.logits(images, classifiers[name])` has the model's scale, and its
        softmax is what calibration and a cascade take.

    Args:
      embed_texts: captions -> unit vectors `[len, e]`.
      tasks: class names and labels (-1: the image does not count) by task name.
      prompts: templates with one "{}" for the class name.

    Raises:
      ValueError: for a label beyond the class names.
    """

    def __init__(
        self,
        embed_texts: Callable[[Sequence[str]], np.ndarray],
        tasks: dict[str, Task],
        prompts: Sequence[str] = ("{}",),
    ) -> None:
        for name, task in tasks.items():
            if task.labels.max(initial=-1) >= len(task.class_names):
                raise ValueError(
                    f"task {name!r} has {len(task.class_names)} class names and the "
                    f"label {task.labels.max()}: labels count from 0, so it needs at "
                    f"least {task.labels.max() + 1} names"
                )
        self._tasks = tasks
        self.classifiers = {
            name: class_vectors(embed_texts, task.class_names, prompts)
            for name, task in tasks.items()
        }

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by metric name."""
        found: dict[str, float] = {}
        for name, task in self._tasks.items():
            found |= accuracy.chance(name, len(task.class_names))
        return found

    def run(self, images: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, accuracy) for image embeddings `[len(source), e]`.

        A row of NaN is an image that could not be read; it does not count.
        """
        for name in self._tasks:
            scores, labels = self._scores(name, images)
            if len(labels):
                yield from accuracy.accuracies(name, scores, labels)

    def per_class(self, name: str, images: np.ndarray) -> np.ndarray:
        """Top-1 accuracy of each class of a task, `[classes]`; NaN: it has no image.

        Args:
          images: embeddings `[len(source), e]`, as in `run`.
        """
        scores, labels = self._scores(name, images)
        classes = len(self.classifiers[name])
        hits = np.bincount(labels[accuracy.ranks(scores, labels) == 0], None, classes)
        images_of = np.bincount(labels, None, classes)
        return np.where(images_of > 0, hits / np.maximum(images_of, 1), np.nan)

    def _scores(self, name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines `[m, classes]` and labels `[m]` of the images that count."""
        labels = self._tasks[name].labels[: len(images)]
        counted = accuracy.counts(images, labels)
        return images[counted] @ self.classifiers[name].T, labels[counted]


def class_vectors(
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    prompts: Sequence[str],
) -> np.ndarray:
    """A unit vector for each class, `[classes, e]`: the mean of its prompts' vectors.

    As in CLIP (Radford et al. 2021, section 3.1.4). Each template has one "{}".
    """
    texts = [p.replace("{}", c) for c in class_names for p in prompts]
    vectors = embed_texts(texts).reshape(len(class_names), len(prompts), -1)
    mean = vectors.mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
