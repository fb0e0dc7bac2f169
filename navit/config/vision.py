"""The image tower's part of a configuration (`navit/config/model.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from navit.config.overrides import positive


def check_heads(config: Any) -> None:
    """Raises ValueError unless heads divide the width."""
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
      * `"none"`: no embedding is added, as in towers with rotary positions alone.
    `resize`: how `"siglip2"` resizes its table: as released (antialiased); like
    PyTorch's `"bicubic"` without and with antialias (cubic kernels with a = -0.75 and
    -0.5); or bilinearly with the corner cells at the image's corners.
    `frame`: a table is resized to the image's `"own"` grid, or to the `"square"` of its
    longer side, which is then cut at the top left (timm's `par` towers).
    `coordinates`: `"absolute"` counts patches; `"fractional"` divides each by the
    image's own side; `"fractional_aspect"` divides both by the longer side, which keeps
    the aspect ratio visible (NaViT Fig. 16).
    `encoding`: a learned table of `size` entries, fixed sinusoids, or learned Fourier
    features. `combine`: `phi_row + phi_column`, their product, or half the width each.
    """

    kind: Literal["siglip2", "learned_1d", "learned_2d", "factorized", "none"] = (
        "siglip2"
    )
    size: int = 16
    coordinates: Literal["absolute", "fractional", "fractional_aspect"] = "fractional"
    encoding: Literal["learned", "sinusoidal", "fourier"] = "learned"
    combine: Literal["sum", "product", "stack"] = "sum"
    resize: Literal[
        "linear-antialias", "bicubic", "bicubic-antialias", "linear-align-corners"
    ] = "linear-antialias"
    frame: Literal["own", "square"] = "own"

    def __post_init__(self) -> None:
        positive(self, "size")
        if self.frame != "own" and self.kind != "siglip2":
            raise ValueError(
                f"frame={self.frame} has no effect on kind={self.kind}: set frame=own, "
                "or kind=siglip2"
            )

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
class RotaryConfig:
    """Rotary positions: queries and keys turn by angles linear in (row, column).

    `kind` gives each pair of channels its frequency on each axis
    (`navit/model/rotary.py`):
      * `"qwen"` (Qwen2-VL to 3-VL) and `"moonvit"` (the same; its converter permutes
        channels): half of the pairs turn with the row, half with the column.
      * `"pixtral"`: the same, but the axes take turns in the list of frequencies.
      * `"eva"` (EVA-02): `"qwen"` on coordinates scaled to a grid of 16 patches a side.
      * `"axial"` and `"mixed"` (rope-vit): columns before rows; or frequencies that
        each head of each block learns.
      * `"dinov3"`: coordinates from -1 to 1.

    `theta`: the base of the frequencies: low ones turn all pairs farther.
    `coordinates`: `"index"` counts patches, `"centred"` runs from -1 to 1 along each
    side of the image, and `"reference"` from 0 to `reference`, whatever its size.
    None takes the kind's own.
    """

    kind: Literal["qwen", "moonvit", "pixtral", "eva", "axial", "mixed", "dinov3"] = (
        "qwen"
    )
    theta: float | None = None
    coordinates: Literal["index", "centred", "reference"] | None = None
    reference: int | None = None

    def __post_init__(self) -> None:
        for name in ("theta", "reference"):
            if getattr(self, name) is not None:
                positive(self, name)
        scaled = self.coordinates == "reference" or (
            self.kind == "eva" and self.coordinates is None
        )
        if self.reference is not None and not scaled:
            raise ValueError(
                f"reference={self.reference} is for coordinates='reference': set both, "
                "or reference to none"
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

    `mean`, `std`: of each colour, of pixels from 0 to 1: what the tower was trained to
    have subtracted and divided by.

    The rest makes the blocks of other released towers; the defaults are SigLIP 2's, and
    the pooling head always is.
    `rotary`: turns queries and keys, besides what `position` adds or in its place.
    `norm`, `eps`: of every norm. `act`: GELU by its tanh approximation, exact, or as
    x sigmoid(1.702 x); or SiLU. `gated`: the MLP is down(act(gate(x)) * up(x)).
    `patch_bias`: of the patch embedding; None is `use_bias`. `patch_frames`: frames of
    a video in one patch; a still image counts as that many equal frames (Qwen2-VL).
    `pre_norm`: a norm before the first block. `final_norm`: one after the last.
    `pool_norm`: one of the pooled vector.
    `layer_scale`: the first value of a learned factor of each channel of each branch
    (CaiT, arXiv 2103.17239); None has no factors.
    `registers`: learned tokens that every image has besides its patches (arXiv
    2309.16588). They are not pooled, not returned, and do not turn.
    `window`: patches a side of the windows within which tokens attend; 0 has none.
    Tokens attend to their whole image in the blocks of `full_blocks`, counted from 0.
    `family`: the release whose layout the tower was read from. It decides only the
    format in which the tower is written; None writes SigLIP's.
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
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rotary: RotaryConfig | None = None
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    act: Literal["tanh", "exact", "quick", "silu"] = "tanh"
    gated: bool = False
    patch_bias: bool | None = None
    patch_frames: int = 1
    pre_norm: bool = False
    final_norm: bool = True
    pool_norm: bool = False
    layer_scale: float | None = None
    registers: int = 0
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    family: Literal["moonvit", "qwen_vl", "ovis", "pixtral", "timm"] | None = None

    def __post_init__(self) -> None:
        positive(self, "patch_size", "width", "depth", "mlp_dim", "num_heads", "eps")
        positive(self, "patch_frames")
        check_heads(self)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or min(values) < 0 or max(values) > 1:
                raise ValueError(
                    f"{name} is {values}, but should be three numbers from 0 to 1, "
                    "one for each colour"
                )
        if not min(self.std):
            raise ValueError(f"std is {self.std}, but none may be 0")
        self._check_options()
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

    @property
    def is_half(self) -> bool:
        """Whether pixels come to lie in [-1, 1]."""
        return self.mean == self.std == (0.5, 0.5, 0.5)

    def _check_options(self) -> None:
        if self.layer_scale is not None:
            positive(self, "layer_scale")
        for name in ("registers", "window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 has none")
        head = self.width // self.num_heads
        if self.rotary is not None and head % 4:
            raise ValueError(
                f"rotary positions turn pairs of channels on two axes, so they need a "
                f"head width divisible by 4, not {head}: change width or num_heads"
            )
        if bool(self.window) != bool(self.full_blocks):
            raise ValueError(
                f"window={self.window} and full_blocks={self.full_blocks} go together: "
                "without a block of full attention, no window sees another"
            )
        if wrong := [i for i in self.full_blocks if not 0 <= i < self.depth]:
            raise ValueError(
                f"full_blocks has {wrong[0]}, but the {self.depth} blocks are 0 to "
                f"{self.depth - 1}"
            )
        if self.window and self.registers:
            raise ValueError(
                f"registers={self.registers} belong to no window of window="
                f"{self.window}: set one of them to 0"
            )
