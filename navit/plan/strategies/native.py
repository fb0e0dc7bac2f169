"""One view that keeps the image's aspect: Qwen-VL, Kimi-VL, Pixtral, NaFlex."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from navit.plan.geometry import grid_for
from navit.plan.strategies import views
from navit.plan.strategies.views import BLACK, Block, Layout, Separator, View

# Qwen2-VL refuses images that are longer than this many times their width.
_LONGEST_ASPECT = 200

# Kimi-VL's position table ends before this many patches.
_KIMI_SIDE = 512


@dataclasses.dataclass(frozen=True)
class QwenVL:
    """Rounds both sides to a multiple of `patch * merge`, within bounds of the area.

    The bounds are not strict: rounding may exceed either. Qwen3-VL has `patch=16`,
    `min_pixels=65536` and `max_pixels=16777216`; Ovis2.5 has `patch=16`,
    `min_pixels=200704`, `max_pixels=2408448`, `temporal_patch=1` and
    `resample="bilinear"`.

    `temporal_patch`: frames of a video that share their tokens; a still image counts as
    two equal frames.
    `qwen_vl_utils`: round as that package does. It gives a side at least one multiple
    in the first rounding, and transformers does so only where it shrinks.

    From `smart_resize` in transformers' image_processing_qwen2_vl.py and in
    qwen-vl-utils (arXiv 2409.12191).
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = dataclasses.field(default=56 * 56, kw_only=True)
    max_pixels: int = dataclasses.field(default=28 * 28 * 1280, kw_only=True)
    temporal_patch: int = dataclasses.field(default=2, kw_only=True)
    qwen_vl_utils: bool = dataclasses.field(default=False, kw_only=True)
    resample: Literal["bilinear", "bicubic"] = dataclasses.field(
        default="bicubic", kw_only=True
    )

    short: ClassVar[str] = "qwen"

    def __post_init__(self) -> None:
        fields = ("patch", "merge", "min_pixels", "max_pixels", "temporal_patch")
        views.check_fields(self, *fields)
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"QwenVL.min_pixels={self.min_pixels} is more than "
                f"max_pixels={self.max_pixels}"
            )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        return (views.whole(height, width, self._size(height, width), self.patch),)

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        (view,) = self.views(height, width, images=images)
        rows, columns = (side // self.merge for side in view.grid)
        block = Block(0, rows, columns)
        return Separator("<|vision_start|>"), block, Separator("<|vision_end|>")

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`merge` x `merge` patches a token, and the two tags."""
        return views.count(self.layout(height, width, images=images))

    def within(self, max_tokens: int) -> QwenVL:
        """The same rule with at most about this many patches an image."""
        most = max_tokens * self.patch**2
        least = min(self.min_pixels, most)
        return dataclasses.replace(self, max_pixels=most, min_pixels=least)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        aspect = max(height, width) / min(height, width)
        if aspect > _LONGEST_ASPECT:
            raise ValueError(
                f"an image of {height}x{width} pixels has an aspect of {aspect:.0f}:1, "
                f"and Qwen-VL takes at most {_LONGEST_ASPECT}:1: crop it, or leave it "
                "out"
            )
        unit = self.patch * self.merge
        least, shrunk_least = (unit, 0) if self.qwen_vl_utils else (0, unit)
        high = max(least, round(height / unit) * unit)
        wide = max(least, round(width / unit) * unit)
        if high * wide > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            high = max(shrunk_least, math.floor(height / scale / unit) * unit)
            wide = max(shrunk_least, math.floor(width / scale / unit) * unit)
        elif high * wide < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * scale / unit) * unit
            wide = math.ceil(width * scale / unit) * unit
        if not high or not wide:
            raise ValueError(
                f"an image of {height}x{width} pixels is resized to {high}x{wide} by "
                "QwenVL: crop it, leave it out, raise max_pixels, or set "
                "qwen_vl_utils=False"
            )
        return high, wide


@dataclasses.dataclass(frozen=True)
class Kimi:
    """Shrinks to about `max_tokens` patches, never enlarges, and pads below and right.

    Sides are padded with black to a multiple of `patch * merge`, so an image may take
    more than `max_tokens` patches: 4232 for 1792x896 pixels, 5184 for 6367x149.
    Kimi-K2.5 has `max_tokens=16384`.

    From Kimi-VL's image_processing_kimi_vl.py (arXiv 2504.07491).
    """

    patch: int = 14
    max_tokens: int = 4096
    merge: int = dataclasses.field(default=2, kw_only=True)

    short: ClassVar[str] = "kimi"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "patch", "max_tokens", "merge")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        patch, unit = self.patch, self.patch * self.merge
        size, patches = (height, width), (width // patch) * (height // patch)
        if patches > self.max_tokens:
            scale = math.sqrt(self.max_tokens / patches)
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
        high, wide = (-(-side // unit) * unit for side in size)
        if max(high, wide) // patch >= _KIMI_SIDE:
            raise ValueError(
                f"an image of {height}x{width} pixels takes {high // patch}x"
                f"{wide // patch} patches, and Kimi-VL takes fewer than {_KIMI_SIDE} a "
                "side: crop it, or leave it out"
            )
        return (
            View(
                box=(0, 0, height, width),
                size=size,
                window=(0, 0, high, wide),
                grid=(high // patch, wide // patch),
                role="whole",
                fill=None if size == (high, wide) else BLACK,
            ),
        )

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        (view,) = self.views(height, width, images=images)
        rows, columns = (side // self.merge for side in view.grid)
        return (Block(0, rows, columns),)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`merge` x `merge` patches a token, without tags, which are text."""
        return views.count(self.layout(height, width, images=images))

    def within(self, max_tokens: int) -> Kimi:
        """The same rule with about this many patches an image."""
        return dataclasses.replace(self, max_tokens=max_tokens)


@dataclasses.dataclass(frozen=True)
class Pixtral:
    """Shrinks to `side` pixels a side, never enlarges, and rounds up to whole tokens.

    From transformers' image_processing_pixtral.py (arXiv 2410.07073). Mistral Small 3.1
    has `patch=14`, `side=1540` and `merge=2`, patches a side of a token.
    """

    patch: int = 16
    side: int = 1024
    merge: int = dataclasses.field(default=1, kw_only=True)

    short: ClassVar[str] = "pixtral"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "patch", "side", "merge")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        ratio = max(height / self.side, width / self.side)
        if ratio > 1:
            size = (math.floor(height / ratio), math.floor(width / ratio))
        else:
            size = (height, width)
        unit = self.patch * self.merge
        rows, columns = ((side - 1) // unit + 1 for side in size)
        if not rows or not columns:
            raise ValueError(
                f"nothing is left of an image of {height}x{width} pixels on "
                f"{self.side} pixels a side: crop it, or leave it out"
            )
        size = (rows * unit, columns * unit)
        return (views.whole(height, width, size, self.patch),)

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        (view,) = self.views(height, width, images=images)
        rows, columns = (side // self.merge for side in view.grid)
        return (Block(0, rows, columns, newlines=True),)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """One token a block, and one after each row: [IMG_BREAK], at last [IMG_END]."""
        return views.count(self.layout(height, width, images=images))

    def within(self, max_tokens: int) -> Pixtral:
        """The same rule with at most this many patches an image."""
        unit = self.patch * self.merge
        side = max(1, math.isqrt(max_tokens) // self.merge) * unit
        return dataclasses.replace(self, side=min(self.side, side))


@dataclasses.dataclass(frozen=True)
class NaFlex:
    """The grid of least distortion within `max_tokens` patches: `navit.grid_for`.

    From SigLIP 2 (arXiv 2502.14786, section 2.4.2). navit applies this rule if
    no strategy is given. `max_upscale` limits enlarging.
    """

    patch: int = 16
    max_tokens: int = 256
    max_upscale: float | None = dataclasses.field(default=None, kw_only=True)
    resample: Literal["bilinear", "bicubic"] = dataclasses.field(
        default="bilinear", kw_only=True
    )

    short: ClassVar[str] = "naflex"

    def __post_init__(self) -> None:
        views.check_fields(self, "patch", "max_tokens")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        rows, columns = grid_for(
            height,
            width,
            patch_size=self.patch,
            max_tokens=self.max_tokens,
            max_upscale=self.max_upscale,
        )
        size = (rows * self.patch, columns * self.patch)
        return (views.whole(height, width, size, self.patch),)

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        (view,) = self.views(height, width, images=images)
        return (Block(0, *view.grid),)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """One token a patch, and no separators."""
        return views.count(self.layout(height, width, images=images))

    def within(self, max_tokens: int) -> NaFlex:
        """The same rule with at most this many patches an image."""
        return dataclasses.replace(self, max_tokens=max_tokens)
