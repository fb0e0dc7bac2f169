"""Cross-entropy over real images; ignores empty slots and images without a label."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.named_scope("loss")
def classification_loss(
    logits: Float[Array, "m c"], labels: Int[Array, " m"], real: Bool[Array, " m"]
) -> Float[Array, ""]:
    """Mean cross-entropy over the real images that have a label (>= 0)."""
    real = real & (labels >= 0)
    right = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    terms = -jnp.where(right, jax.nn.log_softmax(logits), 0.0).sum(-1)
    return jnp.where(real, terms, 0.0).sum() / jnp.maximum(real.sum(), 1)
