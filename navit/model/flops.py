"""Floating point operations of the model on real tokens, and what devices can do.

Model FLOPs as PaLM counts them (arXiv 2204.02311, appendix B): two for each
multiplication in a matrix product, nothing for what is elementwise, read from a table
or recomputed; nothing for padding and empty slots. An image of n tokens attends at n^2,
whatever the row it lies in.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from navit.config import Config, ModelConfig


class Counts(NamedTuple):
    """What went through the model, over all devices; of several steps, their sum.

    Attributes:
      tokens: of real images.
      squares: the sum over images of tokens squared.
      images: real ones.
      captions: that went with them; 0 where the loss takes no text.
      pairs: (image, caption) pairs that the loss compared: the square of a global
        batch's images. 0 where the loss takes no text.
    """

    tokens: int = 0
    squares: int = 0
    images: int = 0
    captions: int = 0
    pairs: int = 0


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations by part of the model.

    Attributes:
      vision: the patch embedding and the blocks of the image tower, without attention.
      attention: queries with keys and weights with values, among an image's tokens.
      head: pooling, the projection and the classifier.
      text: the text tower, its attention included.
      loss: every image with every caption.
    """

    vision: int = 0
    attention: int = 0
    head: int = 0
    text: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def forward(model: ModelConfig, counts: Counts) -> Flops:
    """Of the forward pass alone."""
    v, text = model.vision, model.text
    d = v.width
    vision = 2 * v.patch_size**2 * 3 * d + v.depth * _block(d, v.mlp_dim)
    embed = v.embed_dim or d
    head_token = head_image = 0
    if v.pool == "map":
        # Each token's key, value, logits and weighted sum; then the probe's result.
        head_token = 4 * d * d + 4 * d
        head_image = 2 * d * d + 4 * d * v.mlp_dim
    if v.embed_dim is not None:
        head_image += 2 * d * v.embed_dim
    head_image += 2 * embed * v.num_classes
    caption = 0
    if text is not None:
        w, t = text.width, text.length
        layer = t * _block(w, text.mlp_dim) + 4 * w * t * t
        caption = text.depth * layer + 2 * w * embed
    return Flops(
        vision=counts.tokens * vision,
        attention=counts.squares * v.depth * 4 * d,
        head=counts.tokens * head_token + counts.images * head_image,
        text=counts.captions * caption,
        loss=counts.pairs * 2 * embed,
    )


def train_step(config: Config, counts: Counts) -> Flops:
    """Forward and backward, the latter twice the former; a frozen tower has none."""
    once = forward(config.model, counts)
    vision = 3 if config.optim.vision_lr else 1
    text = 3 if config.optim.text_lr else 1
    return Flops(
        vision=vision * once.vision,
        attention=vision * once.attention,
        head=vision * once.head,
        text=text * once.text,
        loss=(vision + text) // 2 * once.loss,
    )


def _block(width: int, mlp_dim: int) -> int:
    """Of a token in one layer: four projections and the MLP."""
    return 8 * width**2 + 4 * width * mlp_dim


# Dense bfloat16 operations a second of one jax device, by part of its `device_kind`;
# the first that matches counts. From Google's and NVIDIA's data sheets. Where a chip is
# two devices (tpu7x), half of the chip's.
_PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of one device; None where it is not known."""
    found = (peak for name, peak in _PEAKS if name in device_kind)
    return next(found, None)
