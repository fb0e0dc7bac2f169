"""Pixels of patches -> the numbers that a tower was trained with -> vectors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from navit.config import VisionConfig
from navit.model.layers import Linear, product


def normalized(
    patches: UInt8[Array, "b n c"] | Float[Array, "b n c"],
    real: Bool[Array, "b n 1"],
    config: VisionConfig,
) -> Float[Array, "b n c"]:
    """Maps uint8 pixels to the tower's range in float32; padding becomes exactly 0."""
    if patches.dtype == jnp.uint8:
        patches = patches.astype(jnp.float32)
        if config.is_half:
            patches = patches / 127.5 - 1.0
        else:
            pixels = patches.shape[-1] // 3
            mean = np.tile(np.asarray(config.mean, np.float32), pixels) * 255
            std = np.tile(np.asarray(config.std, np.float32), pixels) * 255
            patches = (patches - mean[None, None]) / std[None, None]
    return jnp.where(real, patches.astype(jnp.float32), 0.0)


def embedded(
    layer: Linear, patches: Float[Array, "b n c"], frames: int
) -> Float[Array, "b n d"]:
    """The patch layer's output, for patches of `frames` frames or of a still image.

    A still image stands for equal frames, so it is multiplied with the frames' kernels'
    sum.
    """
    pixels = layer.in_features // frames
    if patches.shape[-1] == layer.in_features:
        return layer(patches)
    kernel = layer.kernel[...].reshape(frames, pixels, -1).sum(0)
    y = product(patches.astype(layer.dtype), layer.rules.gather(kernel, layer.dtype))
    if layer.bias is None:
        return y
    return (y.astype(jnp.float32) + layer.bias[...][None, None]).astype(y.dtype)
