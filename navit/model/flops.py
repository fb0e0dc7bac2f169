"""Floating point operations of the model on real tokens, and peaks of devices.

Model FLOPs are counted as in PaLM (arXiv 2204.02311, appendix B): two for each
multiplication in a matrix product. Elementwise operations, table lookups,
recomputation, padding and empty slots count as zero. Attention of an image of n tokens
costs n^2, whatever its row's length.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from navit.config import Config, ModelConfig


class Counts(NamedTuple):
    """What the model processes on all devices, in one step or in several.

    Attributes:
      tokens: tokens of real images.
      squares: the sum over images of tokens squared.
      images: real images; with `data.strategy` their views, as each is pooled.
      captions: their captions; 0 if the loss takes no text.
      pairs: (image, caption) pairs that the loss compares: the number of images in a
        global batch, squared. 0 if the loss takes no text.
      window_squares: the sum over windows of tokens squared, if blocks attend within
        windows (`window_squares`).
    """

    tokens: int = 0
    squares: int = 0
    images: int = 0
    captions: int = 0
    pairs: int = 0
    window_squares: int = 0


def window_squares(model: ModelConfig, grids: np.ndarray) -> int:
    """The sum over all windows of tokens squared; 0 for a tower without windows.

    Args:
      grids: (rows, columns) of images, `[..., 2]`, of which all tokens are kept.
    """
    window = model.vision.window
    if not window:
        return 0
    sides = np.asarray(grids, np.int64).reshape(-1, 2)
    # Of a window of h x w: h^2 w^2, so the sums over rows and columns multiply.
    squares = sides // window * window**2 + (sides % window) ** 2
    return int(squares.prod(-1).sum())


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations by part of the model.

    Attributes:
      vision: the patch embedding and the blocks of the image tower, without attention.
      attention: products of queries with keys and of weights with values.
      head: pooling, the projection and the classifier.
      text: the text tower, including its attention.
      loss: similarities of every image with every caption.
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
    """Counts the forward pass."""
    v, text = model.vision, model.text
    d = v.width
    # Registers are tokens of every block, and attend with their image's patches.
    r, full = v.registers, len(v.full_blocks) if v.window else v.depth
    tokens = counts.tokens + r * counts.images
    squares = counts.squares + 2 * r * counts.tokens + r**2 * counts.images
    vision = counts.tokens * 2 * v.patch_frames * v.patch_size**2 * 3 * d
    vision += tokens * v.depth * _block(d, v.mlp_dim, gated=v.gated)
    attended = squares * full + counts.window_squares * (v.depth - full)
    embed = v.embed_dim or d
    head_token = head_image = 0
    if v.pool == "map":
        # Per token: key, value, logits and weighted sum. Per image: output and MLP.
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
        vision=vision,
        attention=attended * 4 * d,
        head=counts.tokens * head_token + counts.images * head_image,
        text=counts.captions * caption,
        loss=counts.pairs * 2 * embed,
    )


def train_step(config: Config, counts: Counts) -> Flops:
    """Counts forward and backward passes; backward costs twice forward.

    A frozen tower has no backward pass.
    """
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


def _block(width: int, mlp_dim: int, *, gated: bool = False) -> int:
    """Operations of one token in one layer: four projections and the MLP."""
    return 8 * width**2 + (6 if gated else 4) * width * mlp_dim


# Peak dense bfloat16 operations per second of one jax device, by a substring of its
# `device_kind`; the first match counts. From Google's and NVIDIA's data sheets. A tpu7x
# chip is two devices, so each has half of the chip's peak.
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
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)


def peak(device_kind: str) -> float | None:
    """Peak dense bfloat16 operations per second of one device; None if unknown."""
    matches = (peak for name, peak in _PEAKS if name in device_kind)
    return next(matches, None)
