"""Sizes -> views -> rows, by a resolution strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from navit.plan.rows import Rows, pack_rows
from navit.plan.strategies import Strategy, View

# What `navit/input/fill_views.py` needs of a view, and its number in its image.
VIEW = np.dtype(
    [
        ("number", np.int32),
        ("box", np.int32, 4),
        ("size", np.int32, 2),
        ("window", np.int32, 4),
        ("fill", np.uint8, 3),
    ]
)


class Views(NamedTuple):
    """The views of some images, one image after the other.

    Attributes:
      of_image: each image's views, in the strategy's order; none if it is refused.
      image: `[m]` int64, the image of each view.
      grids: `[m, 2]` int32.
      table: `[m]` VIEW.
      refused: (image, error) of each image that the strategy refuses.
    """

    of_image: list[tuple[View, ...]]
    image: np.ndarray
    grids: np.ndarray
    table: np.ndarray
    refused: list[tuple[int, ValueError]]

    def check(self, name: Callable[[int], str]) -> None:
        """Raises ValueError for the first image that is refused; `name` names it."""
        for image, error in self.refused:
            raise ValueError(f"{name(image)} has no views: {error}") from error

    @property
    def first(self) -> np.ndarray:
        """`[images + 1]`: where each image's views begin."""
        return np.cumsum([0, *map(len, self.of_image)])

    def numbers(self, rows: Rows) -> list[int]:
        """The places of planned views among all views of these images."""
        assert rows.views is not None
        return (self.first[rows.index] + rows.views["number"]).tolist()

    def rows(self, row_tokens: int, slots: int | None) -> Rows:
        """Packs the views; those of one image may come to lie in several rows."""
        planned = pack_rows(self.grids, row_tokens, slots)
        return dataclasses.replace(
            planned, index=self.image[planned.index], views=self.table[planned.index]
        )


def views_of(strategy: Strategy, sizes: np.ndarray, *, patch_size: int) -> Views:
    """The views of every image.

    Args:
      sizes: `[images, 2]` (height, width) in pixels.
      patch_size: the encoder's.

    Raises:
      ValueError: if the strategy has another patch size.
    """
    kind = type(strategy).__name__
    if strategy.patch != patch_size:
        raise ValueError(
            f"{kind} cuts patches of {strategy.patch} pixels, and the model takes "
            f"{patch_size}: pass {kind}(patch={patch_size})"
        )
    of_image: list[tuple[View, ...]] = []
    refused = []
    for i, (height, width) in enumerate(sizes.tolist()):
        try:
            of_image.append(strategy.views(height, width))
        except ValueError as error:
            of_image.append(())
            refused.append((i, error))
    image = np.repeat(np.arange(len(of_image)), [len(views) for views in of_image])
    flat = [view for views in of_image for view in views]
    return Views(of_image, image, grids_of(flat), table_of(of_image), refused)


def grids_of(views: Sequence[View]) -> np.ndarray:
    """The grids of views, int32 `[m, 2]`."""
    return np.array([view.grid for view in views], np.int32).reshape(-1, 2)


def table_of(of_image: Sequence[Sequence[View]]) -> np.ndarray:
    """The views of images, one image after the other: `[m]` VIEW."""
    table = np.zeros(sum(map(len, of_image)), VIEW)
    flat = [(k, view) for views in of_image for k, view in enumerate(views)]
    for i, (number, view) in enumerate(flat):
        fill = view.fill or (0, 0, 0)
        table[i] = (number, view.box, view.size, view.window, fill)
    return table
