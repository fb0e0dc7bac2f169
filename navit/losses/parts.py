"""The training loss: the weighted sum of the parts in `train.losses`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from navit.config import Classification, Loss, Sigmoid, Softmax
from navit.losses.classification import classification_loss
from navit.losses.contrastive import sigmoid_loss, softmax_loss
from navit.sharding import Rules


class Pairs(NamedTuple):
    """Images with their captions.

    Attributes:
      images, texts: unit vectors; text i belongs to image i.
      real: False where there is no pair.
      scale, bias: t' and b; a logit is exp(t') * similarity + b.
    """

    images: Float[Array, "m e"]
    texts: Float[Array, "m e"]
    real: Bool[Array, " m"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]


class Classes(NamedTuple):
    """Images with their classes.

    Attributes:
      logits: the classifier's.
      labels: the right class, -1 = none.
      real: False where there is no image.
    """

    logits: Float[Array, "m c"]
    labels: Int[Array, " m"]
    real: Bool[Array, " m"]


def weighted_sum(
    losses: tuple[Loss, ...],
    *,
    pairs: Pairs | None,
    classes: Classes | None,
    rules: Rules = Rules(),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss, and the value of each of its parts before its weight, by name.

    Args:
      pairs, classes: what the model makes of a batch; None if no part needs it.
    """
    values = {part.short: _value(part, pairs, classes, rules) for part in losses}
    first, *others = (part.weight * values[part.short] for part in losses)
    return sum(others, start=first), values


def _value(
    part: Loss, pairs: Pairs | None, classes: Classes | None, rules: Rules
) -> Float[Array, ""]:
    if isinstance(part, Classification):
        assert classes is not None
        return classification_loss(*classes)
    assert pairs is not None
    images, texts, real, scale, bias = pairs
    match part:
        case Sigmoid(implementation=implementation):
            return sigmoid_loss(
                images,
                texts,
                real,
                scale=scale,
                bias=bias,
                rules=rules,
                implementation=implementation,
            )
        case Softmax():
            return softmax_loss(images, texts, real, scale=scale, rules=rules)
