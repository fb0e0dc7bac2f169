"""One square view of a fixed size: CLIP, LLaVA-1.5, SigLIP."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from navit.plan.strategies import views
from navit.plan.strategies.views import Block, Layout, View

CLIP_MEAN = (122, 116, 104)


@dataclasses.dataclass(frozen=True)
class Square:
    """One square of `size` pixels a side, one token a patch.

    `fit`: "squash" resizes without regard to the aspect, as SigLIP does; "crop" resizes
    the short side to `size` and takes the middle, as CLIP does; "pad" puts the image in
    the middle of a square of the colour `fill`, as LLaVA-1.5 does
    (`expand2square` in llava/mm_utils.py, arXiv 2310.03744).

    LLaVA pads before it resizes. Here the image is resized first, to whole pixels, so
    its edge lies up to half a pixel elsewhere.
    """

    size: int = 336
    patch: int = 14
    fit: Literal["squash", "crop", "pad"] = dataclasses.field(
        default="squash", kw_only=True
    )
    fill: tuple[int, int, int] = dataclasses.field(default=CLIP_MEAN, kw_only=True)

    short: ClassVar[str] = "square"
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bicubic"

    def __post_init__(self) -> None:
        views.check_fields(self, "size", "patch")
        views.check_sides(self, "size")
        if self.fit not in ("squash", "crop", "pad"):
            raise ValueError(
                f'Square.fit must be "squash", "crop" or "pad", not {self.fit!r}'
            )

    def views(self, height: int, width: int, *, images: int = 1) -> tuple[View, ...]:
        views.check(height, width, images)
        side = self.size
        if self.fit == "squash":
            return (views.whole(height, width, (side, side), self.patch),)
        if self.fit == "pad":
            return (pad_to_square(height, width, side, self.patch, self.fill),)
        return (crop_to_square((0, 0, height, width), side, self.patch),)

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        views.check(height, width, images)
        return (Block(0, self.size // self.patch, self.size // self.patch),)

    def tokens(self, height: int, width: int, *, images: int = 1) -> int:
        """One token a patch, and no separators."""
        return views.count(self.layout(height, width, images=images))


def pad_to_square(
    height: int, width: int, side: int, patch: int, fill: tuple[int, int, int]
) -> View:
    """The whole image in the middle of a square, as `expand2square` places it."""
    longest = max(height, width)
    size = (
        max(1, round(side * height / longest)),
        max(1, round(side * width / longest)),
    )
    top = -round((longest - height) // 2 * side / longest)
    left = -round((longest - width) // 2 * side / longest)
    return View(
        box=(0, 0, height, width),
        size=size,
        window=(top, left, top + side, left + side),
        grid=(side // patch, side // patch),
        role="whole",
        fill=None if size == (side, side) else fill,
    )


def crop_to_square(
    box: views.Box,
    side: int,
    patch: int,
    role: Literal["whole", "tile"] = "whole",
    place: tuple[int, int] | None = None,
) -> View:
    """The middle of a box: its short side becomes `side`, as in CLIP's processor."""
    height, width = box[2] - box[0], box[3] - box[1]
    shortest = min(height, width)
    size = (int(side * height / shortest), int(side * width / shortest))
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    window = (top, left, top + side, left + side)
    return View(box, size, window, (side // patch, side // patch), role, place)
