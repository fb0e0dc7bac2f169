"""Both towers, with the scale and bias that turn similarities into logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from navit.config import ModelConfig
from navit.model.merger import Merger
from navit.model.text import Text
from navit.model.vision import Vision
from navit.sharding import Rules


class TwoTower(nnx.Module):
    """An image tower and, unless the config has none, a text tower.

    Attributes:
      scale: t', the logarithm of the logit scale (SigLIP, arXiv 2303.15343, section 3).
      bias: b, added to every logit.
      merger: image tokens -> what a language model gets; None in training.
    """

    def __init__(
        self, config: ModelConfig, rules: Rules = Rules(), *, rngs: nnx.Rngs
    ) -> None:
        self.vision = Vision(config, rules, rngs=rngs)
        has_text = config.text is not None
        scale, bias = math.log(config.init_scale), config.init_bias
        self.text = Text(config, rules, rngs=rngs) if has_text else None
        self.scale = nnx.Param(jnp.float32(scale)) if has_text else None
        self.bias = nnx.Param(jnp.float32(bias)) if has_text else None
        self.merger = (
            Merger(
                config.merger,
                config.vision.width,
                dtype=self.vision.dtype,
                rules=rules,
                rngs=rngs,
            )
            if config.merger is not None
            else None
        )


def normalize(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Scales to unit length; a zero vector stays zero and has a zero gradient."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
