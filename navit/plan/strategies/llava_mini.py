"""LLaVA-Mini: crops of the original, and the whole, each through CLIP's processor."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.square import crop_to_square
from navit.plan.strategies.views import Block, Layout, View


@dataclasses.dataclass(frozen=True)
class LLaVAMini:
    """`splits` x `splits` crops of the image, row by row, then the whole image.

    Each is resized by its short side, and its middle is kept. Pixels that are left when
    a side is not divisible by `splits` are in no crop. With `splits=1`, as for frames
    of a video, the whole is the only view. The language model always gets `side` x
    `side` tokens.

    From `split_image` in LLaVA-Mini's train.py (arXiv 2501.03895).
    """

    tile: int = 336
    splits: int = 2
    patch: int = dataclasses.field(default=14, kw_only=True)
    side: int = dataclasses.field(default=1, kw_only=True)

    short: ClassVar[str] = "llava_mini"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "tile", "splits", "patch", "side")
        views.check_sides(self, "tile")

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        n, tile, patch = self.splits, self.tile, self.patch
        last = crop_to_square((0, 0, height, width), tile, patch)
        if n == 1:
            return (last,)
        high, wide = height // n, width // n
        if not high or not wide:
            raise ValueError(
                f"an image of {height}x{width} pixels cannot be split {n} times a "
                "side: leave it out, or lower LLaVAMini.splits"
            )
        cut = [
            crop_to_square(
                (high * row, wide * column, high * (row + 1), wide * (column + 1)),
                tile,
                patch,
                "tile",
                (row, column),
            )
            for row in range(n)
            for column in range(n)
        ]
        return *cut, last._replace(role="thumbnail")

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        self.views(height, width, images=images)
        return (Block(None, self.side, self.side),)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """`side` x `side` tokens, to which the model compresses all views."""
        return views.count(self.layout(height, width, images=images))
