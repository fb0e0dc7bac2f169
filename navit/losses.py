"""Losses over real images: empty slots count in no row, no column and no mean.

All take global arrays. Under a mesh the image rows stay on their devices and the texts
are gathered, once, here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from navit.sharding import Rules


def sigmoid_loss(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    real: Bool[Array, " m"],
    *,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    rules: Rules = Rules(),
) -> Float[Array, ""]:
    """Every image against every text, each pair on its own (SigLIP, arXiv 2303.15343).

    Args:
      images, texts: unit vectors, matching pair by pair.
      real: False where there is no pair.
      scale, bias: t' and b; a logit is exp(t') * similarity + b.

    Returns:
      The sum over real pairs divided by the number of real images; 0 with none.
    """
    logits = _similarities(images, texts, rules) * jnp.exp(scale) + bias
    both = real[:, None] & rules.replicate(real)[None, :]
    match = jnp.where(_diagonal(logits, rules), 1.0, -1.0)
    terms = jnp.where(both, jax.nn.log_sigmoid(match * logits), 0.0)
    return -terms.sum() / jnp.maximum(real.sum(), 1)


def softmax_loss(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    real: Bool[Array, " m"],
    *,
    scale: Float[Array, ""],
    rules: Rules = Rules(),
) -> Float[Array, ""]:
    """CLIP's loss: the right text for an image and the right image for a text.

    The mean of both directions, each over the real images; arguments as in
    `sigmoid_loss`. A bias would cancel, so there is none.
    """
    logits = _similarities(images, texts, rules) * jnp.exp(scale)
    both = real[:, None] & rules.replicate(real)[None, :]
    # Empty rows keep one finite entry, so that no logsumexp is over nothing.
    diagonal = _diagonal(logits, rules)
    logits = jnp.where(both | diagonal, logits, -jnp.inf)
    right = jnp.where(diagonal, logits, 0.0)
    to_text = jax.nn.logsumexp(logits, 1) - right.sum(1)
    to_image = jax.nn.logsumexp(logits, 0) - right.sum(0)
    total = (
        jnp.where(real, to_text, 0.0).sum()
        + jnp.where(rules.replicate(real), to_image, 0.0).sum()
    )
    return total / 2 / jnp.maximum(real.sum(), 1)


def classification_loss(
    logits: Float[Array, "m c"], labels: Int[Array, " m"], real: Bool[Array, " m"]
) -> Float[Array, ""]:
    """Mean cross-entropy over the real images that have a label (one >= 0)."""
    real = real & (labels >= 0)
    right = labels[:, None] == jnp.arange(logits.shape[-1])
    terms = -jnp.where(right, jax.nn.log_softmax(logits), 0.0).sum(-1)
    return jnp.where(real, terms, 0.0).sum() / jnp.maximum(real.sum(), 1)


def _similarities(
    images: Float[Array, "m e"], texts: Float[Array, "m e"], rules: Rules
) -> Float[Array, "m m"]:
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(images, rules.replicate(texts).T, precision=highest)


def _diagonal(logits: Float[Array, "m m"], rules: Rules) -> Bool[Array, "m m"]:
    def index(axis: int) -> Array:
        return jax.lax.broadcasted_iota(
            jnp.int32, logits.shape, axis, out_sharding=rules("batch", None)
        )

    return index(0) == index(1)
