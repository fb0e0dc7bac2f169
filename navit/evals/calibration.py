"""Expected calibration error: how far a model's confidence is from its accuracy."""

from __future__ import annotations

import numpy as np


def calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15
) -> float:
    """The mean distance of confidence from accuracy, over bins of equal width.

    Guo et al. 2017 (arXiv 1706.04599), equation 3: confidence is the largest
    probability, and a bin weighs as much as the images in it. A bin includes its upper
    edge. NaViT's table 4 reports this error for each number of tokens.

    Args:
      probabilities: `[m, c]`, summing to 1 over the classes.
      labels: `[m]`.

    Raises:
      ValueError: if there is no image, or the rows are not probabilities.
    """
    check_probabilities(probabilities, labels)
    confidence = probabilities.max(1).astype(np.float64)
    hits = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    gaps = np.bincount(index, hits - confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


def check_probabilities(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Checks probabilities `[m, c]` and labels `[m]`.

    Raises:
      ValueError: if there is no image, the numbers differ, a label is out of range, or
        a row does not sum to 1.
    """
    if not len(labels) or len(probabilities) != len(labels):
        raise ValueError(
            f"{len(probabilities)} images have probabilities and {len(labels)} have "
            "labels: give both for the same images, at least one"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} do not fit "
            f"{probabilities.shape[1]} classes: leave out images without a label"
        )
    low, sums = probabilities.min(), probabilities.sum(1, dtype=np.float64)
    worst = sums[np.abs(sums - 1).argmax()]
    if not (low >= 0 and abs(worst - 1) < 1e-3):
        raise ValueError(
            f"a row sums to {worst:g} and the smallest value is {low:g}: give "
            "probabilities (the softmax of the logits)"
        )
