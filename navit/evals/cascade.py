"""The cascade: most images answer at a small budget, the hardest at a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navit.evals.calibration import check_probabilities

# 0 %, 5 % … 100 %
_SHARES = tuple(percent / 100 for percent in range(0, 101, 5))


class Point(NamedTuple):
    """Accuracy and FLOPs an image, with a share of the images sent on."""

    share: float
    accuracy: float
    flops: float


def cascade(
    small: np.ndarray,
    large: np.ndarray,
    labels: np.ndarray,
    *,
    small_flops: int | float,
    large_flops: int | float,
    shares: Sequence[int | float] = _SHARES,
) -> list[Point]:
    """Accuracy against compute, for each share of images sent to the larger budget.

    The hardest images are sent (NaViT, appendix D). Here these are the images whose
    largest probability at the small budget is lowest; among equal ones, the earlier
    is sent first. An image that is sent costs both budgets.

    Args:
      small: probabilities at the small budget, `[m, c]`.
      large: probabilities at the larger budget, `[m, c]`.
      labels: `[m]`.
      small_flops: the cost of an image at the small budget.
      large_flops: the cost of an image at the larger budget.
      shares: from 0 to 1; each is rounded to whole images.

    Raises:
      ValueError: for shares out of range, or what `check_probabilities` refuses.
    """
    check_probabilities(small, labels)
    check_probabilities(large, labels)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares {tuple(shares)} must be from 0 to 1")
    order = small.max(1).argsort(kind="stable")
    before = (small.argmax(1) == labels)[order].astype(int)
    after = (large.argmax(1) == labels)[order].astype(int)
    # How many answers are right when the first n images of `order` are sent.
    right = before.sum() + np.concatenate(([0], np.cumsum(after - before)))
    count = len(labels)
    sent = [round(share * count) for share in shares]
    return [
        Point(n / count, float(right[n] / count), small_flops + n / count * large_flops)
        for n in sent
    ]
