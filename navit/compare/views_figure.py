"""A picture of views: the image with its cuts, and its thumbnails beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navit.compare.candidates import label
from navit.compare.shown import Shown
from navit.compare.views_table import Cell
from navit.files import write_atomic
from navit.plan.strategies import View
from navit.plan.strategies.measures import main_views, scales_of

# Pixels of the longer side of a picture.
_SIDE = 480
_PAGE = np.full((2, 2, 3), 215, np.uint8)
_CUT, _EDGE, _FILL = "#d62728", "#1f4e79", "#9a9a9a"

Box = tuple[float, float, float, float]


def plot(images: Sequence[Shown], cells: Sequence[Sequence[Cell]], path: Path) -> None:
    """Draws every strategy (columns) on every image (rows) into a .png.

    The scale of a drawing is that of what the encoder sees, so distortion is visible.
    Filler is hatched, and a part of the image that no view shows is pale.
    """
    from matplotlib.figure import Figure  # slow to import, and only used here

    rows, columns = len(cells), len(cells[0])
    figure = Figure(figsize=(2.5 * columns + 0.4, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for image, row, axes in zip(images, cells, grid, strict=True):
        picture = _picture(image)
        for cell, ax in zip(row, axes, strict=True):
            ax.set(xticks=[], yticks=[], aspect="equal")
            ax.spines[:].set_visible(False)
            ax.set_title(_title(cell), size=8)
            if cell.measures is None:
                ax.text(0.5, 0.5, "refused", ha="center", transform=ax.transAxes)
            else:
                _draw(ax, cell.measures.views, picture, image.height, image.width)
        size = f"{image.width} × {image.height}"
        name = Path(image.name).name
        named = size if image.file is None else f"{name}\n{size}"
        axes[0].set_ylabel(f"{named} (width × height)", size=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())


def _title(cell: Cell) -> str:
    found = cell.measures
    name = label(cell.strategy).replace(":", "\n", 1)
    if found is None:
        return name
    views = f"{len(found.views)} view" + "s" * (len(found.views) > 1)
    tokens = f"{found.tokens:,} token" + "s" * (found.tokens > 1)
    return f"{name}\n{views}, {tokens}, scale {found.scale:.2f}"


def _picture(image: Shown) -> np.ndarray:
    if image.file is None:
        return _PAGE
    from navit.input.pixels import load

    scale = min(1.0, _SIDE / max(image.height, image.width))
    height, width = (max(1, round(x * scale)) for x in (image.height, image.width))
    with image.file.open() as file:
        try:
            return load(file, height, width)
        except ValueError as error:
            raise ValueError(f"cannot read {image.name}: {error}") from error


def _draw(
    ax: Any, views: Sequence[View], picture: np.ndarray, height: int, width: int
) -> None:
    """Draws main views where they lie in the image, and thumbnails on the right."""
    mains = main_views(views)
    high, wide = scales_of(mains[0])
    _image(ax, picture, (0.0, 0.0, height * high, width * wide), alpha=0.25)
    frames = [_frame(view) for view in mains]
    for view, frame in zip(mains, frames, strict=True):
        color = _CUT if len(mains) > 1 else _EDGE
        _view(ax, view, frame, (0.0, 0.0), picture, (height, width), color)
    top = min(0, *(frame[0] for frame in frames))
    left = min(0, *(frame[1] for frame in frames))
    bottom = max(height * high, *(frame[2] for frame in frames))
    right = max(width * wide, *(frame[3] for frame in frames))
    gap = 0.06 * max(right - left, bottom - top)
    for view in views:
        if view not in mains:
            frame = _frame(view)
            shift = (top - frame[0], right + gap - frame[1])
            _view(ax, view, frame, shift, picture, (height, width), _EDGE)
            right += gap + frame[3] - frame[1]
            bottom = max(bottom, top + frame[2] - frame[0])
    margin = gap / 4
    ax.set(xlim=(left - margin, right + margin), ylim=(bottom + margin, top - margin))


def _frame(view: View) -> Box:
    """(top, left, bottom, right) of a window, if the whole image has its scale."""
    high, wide = scales_of(view)
    top, left = view.box[0] * high, view.box[1] * wide
    window = view.window
    return top + window[0], left + window[1], top + window[2], left + window[3]


def _view(
    ax: Any,
    view: View,
    frame: Box,
    shift: tuple[float, float],
    picture: np.ndarray,
    size: tuple[int, int],
    color: str,
) -> None:
    from matplotlib.patches import Rectangle

    corner = (frame[1] + shift[1], frame[0] + shift[0])
    sides = (frame[3] - frame[1], frame[2] - frame[0])
    if view.fill is not None:
        filler = Rectangle(corner, *sides, facecolor="#ececec", edgecolor=_FILL)
        filler.set(hatch="////", linewidth=0, zorder=2)
        ax.add_patch(filler)
    high, wide = scales_of(view)
    whole = (
        shift[0],
        shift[1],
        shift[0] + size[0] * high,
        shift[1] + size[1] * wide,
    )
    drawn = _image(ax, picture, whole)
    drawn.set_clip_path(Rectangle(corner, *sides, transform=ax.transData))
    edge = Rectangle(corner, *sides, fill=False, edgecolor=color)
    edge.set(linewidth=1.2, zorder=4)
    ax.add_patch(edge)


def _image(ax: Any, picture: np.ndarray, place: Box, alpha: float = 1.0) -> Any:
    top, left, bottom, right = place
    extent = (left, right, bottom, top)
    return ax.imshow(picture, extent=extent, alpha=alpha, zorder=3, aspect="equal")
