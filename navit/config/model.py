"""The model part of a configuration (`navit/config/experiment.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from navit.config.overrides import positive

# Settings of `ModelConfig` that change how a model is computed, but change its numbers
# only by rounding.
ROUNDING = (
    "model.dtype",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "model.fused",
)


def _divisible(config: Any) -> None:
    if config.width % config.num_heads:
        raise ValueError(
            f"width {config.width} is not divisible by num_heads {config.num_heads}"
        )


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """The position embedding and its size.

    `kind`:
      * `"siglip2"`: a learned `size` x `size` table, resized bilinearly with
        antialiasing to the image's grid, per token (SigLIP 2 section 2.4.2).
      * `"learned_1d"`: a learned vector for each of `size` raster positions (ViT).
      * `"learned_2d"`: a learned `size` x `size` table read at (row, column), without
        resizing (Pix2Struct, as NaViT section 3.2 describes it).
      * `"factorized"`: one embedding of the row and one of the column (NaViT section
        3.2), made with `coordinates`, `encoding` and `combine`.
    `coordinates`: `"absolute"` counts patches; `"fractional"` divides each by the
    image's own side; `"fractional_aspect"` divides both by the longer side, which keeps
    the aspect ratio visible (NaViT Fig. 16).
    `encoding`: a learned table of `size` entries, fixed sinusoids, or learned Fourier
    features. `combine`: `phi_row + phi_column`, their product, or half the width each.
    """

    kind: Literal["siglip2", "learned_1d", "learned_2d", "factorized"] = "siglip2"
    size: int = 16
    coordinates: Literal["absolute", "fractional", "fractional_aspect"] = "fractional"
    encoding: Literal["learned", "sinusoidal", "fourier"] = "learned"
    combine: Literal["sum", "product", "stack"] = "sum"

    def __post_init__(self) -> None:
        positive(self, "size")

    @property
    def has_limit(self) -> bool:
        """Whether a grid can be larger than the table."""
        return self.kind.startswith("learned") or (
            self.kind == "factorized"
            and self.encoding == "learned"
            and self.coordinates == "absolute"
        )

    def check(self, grids: np.ndarray) -> None:
        """Raises ValueError if any grid `[..., 2]` reaches beyond a learned table."""
        grids = np.asarray(grids).reshape(-1, 2)
        if not self.has_limit:
            return
        if self.kind == "learned_1d":
            reach, unit = grids.prod(-1), "tokens"
        else:
            reach, unit = grids.max(-1, initial=0), "patches a side"
        if (reach > self.size).any():
            rows, columns = grids[int(reach.argmax())]
            raise ValueError(
                f"a grid of {rows}x{columns} has {reach.max()} {unit}, and the "
                f"position table ends at {self.size}: lower the token budget, raise "
                'position.size, or choose position.kind="siglip2", which has no limit'
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image tower. `embed_dim=None` means no projection after pooling.

    `fixed_grid`: every image is resized to the whole `position.size` x `position.size`
    grid without its aspect, as in the training of fixed-resolution checkpoints. For
    evaluation and embedding; training keeps the aspect.
    `image_size`: with `fixed_grid`, images are resized to this many pixels per side
    before the rest beyond the last whole patch is cut off (so400m-patch14-384: 384, of
    which 27 x 27 patches of 14 see 378). None: the pixels of the patches.
    """

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    position: PositionConfig = PositionConfig()
    qk_norm: bool = False
    use_bias: bool = True
    pool: Literal["map", "mean", "max", "none"] = "map"
    embed_dim: int | None = None
    num_classes: int = 0
    fixed_grid: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        positive(self, "patch_size", "width", "depth", "mlp_dim", "num_heads")
        _divisible(self)
        if self.embed_dim is not None:
            positive(self, "embed_dim")
        if self.image_size is not None:
            if not self.fixed_grid:
                raise ValueError(
                    f"image_size={self.image_size} is for fixed_grid=true: set both, "
                    "or image_size to none"
                )
            if self.image_size // self.patch_size != self.position.size:
                raise ValueError(
                    f"image_size={self.image_size} has "
                    f"{self.image_size // self.patch_size} patches of patch_size="
                    f"{self.patch_size} per side, but position.size is "
                    f"{self.position.size}"
                )
        if self.pool == "none" and (self.embed_dim or self.num_classes):
            raise ValueError(
                'pool="none" returns only tokens, so it takes no embed_dim and no '
                f"num_classes (got {self.embed_dim} and {self.num_classes})"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower: `length` token ids in, the last position projected out.

    `tokenizer`: "bytes", which needs no file, or the path of a SentencePiece `.model`
    or a `tokenizer.json`: Gemma's (SigLIP 2) or SigLIP 1's. None: unknown.
    """

    tokenizer: str | None = "bytes"
    vocab_size: int = 258
    length: int = 64
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "length", "width", "depth", "mlp_dim")
        positive(self, "num_heads")
        _divisible(self)
        if self.tokenizer == "bytes" and self.vocab_size < 258:
            raise ValueError(
                f"the byte tokenizer needs vocab_size 258, not {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both towers, the logit scale and bias, and how they are computed.

    `dtype="auto"` is bfloat16 on an accelerator and float32 on a CPU, where bfloat16 is
    slower. Parameters, softmax and losses are always float32.
    `fused` lets TPUs run the norms and products around attention as separate kernels
    if they fit (`navit/kernels/fused.py`).
    `init_scale` is exp(t') and `init_bias` is b of the SigLIP paper's section 3.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig | None = TextConfig()
    init_scale: float = 10.0
    init_bias: float = -10.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "xla", "unpack", "splash", "splash_skip"] = "auto"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    scan_unroll: int = 1
    fused: bool = True

    def __post_init__(self) -> None:
        positive(self, "init_scale", "scan_unroll")
