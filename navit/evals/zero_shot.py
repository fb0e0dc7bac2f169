"""Zero-shot classification: the class whose prompts are nearest to the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from navit.evals.accuracy import Classification
from navit.sources.source import Task


def zero_shot(
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    logits: Callable[[np.ndarray, np.ndarray], np.ndarray],
    task: Task,
    prompts: Sequence[str] = ("{}",),
) -> Classification:
    """The evaluator of unit vectors `[m, e]` by the cosines with a task's classes.

    The classes are embedded here, once for all budgets.

    Args:
      embed_texts: captions -> unit vectors `[len, e]`.
      logits: unit vectors of images and texts, `[m, e]` and `[c, e]` -> `[m, c]`.
      prompts: templates with one "{}" for the class name.
    """
    classifier = class_vectors(embed_texts, task.class_names, prompts)
    return Classification(
        lambda images: images @ classifier.T,
        task,
        logits=lambda images: logits(images, classifier),
    )


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
