"""Sizes -> views -> rows, by a resolution strategy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from navit.plan.rows import Rows, pack_rows
from navit.plan.strategies import Strategy, View
from navit.plan.strategies.views import BLACK, check_patch

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
      tokens: `[images]` int64, of all views of an image.
    """

    of_image: list[tuple[View, ...]]
    image: np.ndarray
    grids: np.ndarray
    table: np.ndarray
    refused: list[tuple[int, ValueError]]
    tokens: np.ndarray

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
      TypeError: if it is no strategy.
      ValueError: if it has another patch size.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy is {strategy!r}, but should be one of navit.strategies, such as "
            "strategies.InternVL(patch=16)"
        )
    check_patch(strategy, patch_size)
    of_image: list[tuple[View, ...]] = []
    refused = []
    for i, (height, width) in enumerate(sizes.tolist()):
        try:
            of_image.append(strategy.views(height, width))
        except ValueError as error:
            of_image.append(())
            refused.append((i, error))
    image = np.repeat(np.arange(len(of_image)), [len(views) for views in of_image])
    table, grids = tables_of([numbers_of(views) for views in of_image])
    tokens = np.bincount(image, grids.prod(-1), len(of_image)).astype(np.int64)
    return Views(of_image, image, grids, table, refused, tokens)


def numbers_of(views: Sequence[View]) -> np.ndarray:
    """The views of an image as plain numbers, int32 `[m, 16]`; see `tables_of`."""
    return np.array(
        [
            (k, *view.box, *view.size, *view.window, *(view.fill or BLACK), *view.grid)
            for k, view in enumerate(views)
        ],
        np.int32,
    ).reshape(-1, 16)


def tables_of(numbers: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tables of VIEW `[m]` and grids `[m, 2]`, of the `numbers_of` several images."""
    joined = np.concatenate([np.zeros((0, 16), np.int32), *numbers])
    table, at = np.zeros(len(joined), VIEW), 0
    for name in VIEW.names or ():
        shape = VIEW[name].shape
        width = math.prod(shape)
        table[name] = joined[:, at : at + width].reshape(-1, *shape)
        at += width
    return table, joined[:, at:]
