"""Zero-shot classification: the class whose prompts are nearest to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from navit.sources.source import Task


class ZeroShot:
    """Accuracy on each task of a source.

    Args:
      embed_texts: captions -> unit vectors `[len, e]`.
      tasks: class names and labels (-1: the image does not count) by task name.
      prompts: templates with one "{}" for the class name; a class is the mean of its
        prompts' vectors, as in CLIP.
    """

    def __init__(
        self,
        embed_texts: Callable[[Sequence[str]], np.ndarray],
        tasks: dict[str, Task],
        prompts: Sequence[str] = ("{}",),
    ) -> None:
        self._tasks = tasks
        self._classes = {}
        for name, task in tasks.items():
            texts = [p.replace("{}", c) for c in task.class_names for p in prompts]
            vectors = embed_texts(texts).reshape(
                len(task.class_names), len(prompts), -1
            )
            mean = vectors.mean(1)
            self._classes[name] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by metric name."""
        return {_metric(k): 1 / len(t.class_names) for k, t in self._tasks.items()}

    def run(self, images: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, accuracy) for image embeddings `[len(source), e]`.

        A row of NaN is an image that could not be read; it does not count.
        """
        for name, task in self._tasks.items():
            counted = (task.labels[: len(images)] >= 0) & ~np.isnan(images[:, 0])
            if counted.any():
                nearest = (images[counted] @ self._classes[name].T).argmax(-1)
                labels = task.labels[: len(images)][counted]
                yield _metric(name), float((nearest == labels).mean())


def _metric(task: str) -> str:
    return f"{task}_accuracy"
