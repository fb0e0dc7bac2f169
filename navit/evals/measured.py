"""One evaluation at one budget: vectors in, metrics out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from navit.evals.accuracy import Classification, Confidences, PerClass
from navit.evals.metric import Metric
from navit.evals.probes import Probe
from navit.evals.tasks import Evaluator, Images, Opened
from navit.evals.vectors import Vectors
from navit.sources.source import Source


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      metrics: none if no image counts.
      confidences: those of a classifier; None for others.
      per_class: the accuracy of each class that has an image, if it is wanted.
    """

    metrics: list[Metric]
    confidences: Confidences | None = None
    per_class: dict[str, PerClass] | None = None


def measure(
    each: Opened, evaluator: Evaluator, held: dict[Source, Vectors]
) -> Measured:
    """Measures with the vectors of each source."""
    images = _vectors(each, each.images, held)
    if isinstance(evaluator, Probe):
        assert each.train is not None
        learned = _vectors(each, each.train[0], held)
        return Measured([*evaluator.run(images, learned)])
    if isinstance(evaluator, Classification):
        return Measured(
            [*evaluator.run(images)],
            evaluator.confidences(images),
            evaluator.per_class(images) if each.task.per_class else None,
        )
    return Measured([*evaluator.run(images)])


def _vectors(each: Opened, images: Images, held: dict[Source, Vectors]) -> np.ndarray:
    """`[m, e]` of unit norm; for class logits and probes, as they are pooled."""
    pooled = held[images.source].pooled[: images.limit]
    if each.task.kind not in ("zero_shot", "retrieval"):
        return pooled
    return pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-6)
