"""A table of what strategies make of images: cost, detail and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from navit.compare.candidates import label
from navit.compare.shown import Shown
from navit.plan.strategies import Strategy
from navit.plan.strategies.measures import Measures, Tower, measure

_HEADS = (
    ("views", 5),
    ("encoder tokens", 14),
    ("tokens out", 10),
    ("TFLOPs", 7),
    ("scale", 5),
    ("kept", 6),
    ("distortion", 10),
    ("padding", 7),
    ("thumbnail", 9),
    ("cut", 5),
)


class Cell(NamedTuple):
    """A strategy on an image: its measures, or why it refuses the image."""

    strategy: Strategy
    measures: Measures | None
    refusal: str = ""


def compare(
    images: Sequence[Shown],
    strategies: Sequence[Strategy],
    *,
    tower: Tower,
    object_size: tuple[int, int] = (64, 64),
) -> list[list[Cell]]:
    """Every strategy on every image, `[images][strategies]`."""
    return [
        [_cell(strategy, image, tower, object_size) for strategy in strategies]
        for image in images
    ]


def _cell(
    strategy: Strategy, image: Shown, tower: Tower, object_size: tuple[int, int]
) -> Cell:
    try:
        found = measure(
            strategy, image.height, image.width, tower=tower, object_size=object_size
        )
    except ValueError as error:
        return Cell(strategy, None, str(error))
    return Cell(strategy, found)


def table(images: Sequence[Shown], cells: Sequence[Sequence[Cell]]) -> str:
    """One block of lines for each image; sizes are width x height."""
    longest = max(len(label(cell.strategy)) for row in cells for cell in row)
    heads = "  ".join(f"{name:>{width}}" for name, width in _HEADS)
    text = ""
    for image, row in zip(images, cells, strict=True):
        size = f"{image.width}x{image.height}"
        name = "" if image.name == size else f"{image.name}, "
        text += f"{name}{size} pixels (width x height)\n{'strategy':{longest}}  {heads}"
        for cell in row:
            text += f"\n{label(cell.strategy):{longest}}  {_line(cell)}"
        text += "\n\n"
    return text


def _line(cell: Cell) -> str:
    found = cell.measures
    if found is None:
        return f"refused (height x width): {cell.refusal}"
    cells = (
        f"{len(found.views)}",
        f"{found.encoder_tokens}",
        f"{found.tokens}",
        f"{found.flops / 1e12:.3f}",
        f"{found.scale:.2f}",
        f"{found.kept:.1%}",
        f"{found.distortion:.2f}",
        f"{found.padding:.1%}",
        f"{found.thumbnail:.1%}",
        f"{found.cut:.0%}",
    )
    return "  ".join(
        f"{x:>{width}}" for x, (_, width) in zip(cells, _HEADS, strict=True)
    )
