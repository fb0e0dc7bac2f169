"""Images -> vectors and features, by a resolution strategy (`navit.strategies`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from navit.config import Config
from navit.embed_batches import check_budget, filled_batches
from navit.embed_rows import tokens_of
from navit.input.fill import Filled
from navit.model.merger import Merger
from navit.model.vision import Vision
from navit.plan.rows import Rows
from navit.plan.strategies import Strategy, View
from navit.plan.view_rows import Views, views_of
from navit.sources.source import Record

# The most views in a row.
_SLOTS = 8

# The most images whose features are held at a time.
_AT_ONCE = 16


class ViewFeatures(NamedTuple):
    """A view of an image, and its tokens: float32 `[rows, columns, d]`."""

    view: View
    tokens: np.ndarray


def batches(
    config: Config,
    read: Callable[[int], Record],
    sizes: np.ndarray,
    strategy: Strategy,
) -> tuple[Views, int, Iterator[tuple[Rows, Filled]]]:
    """Packs the views of images, as `navit.embed_batches.batches` packs images.

    Args:
      read: index -> record, from several threads.
      sizes: `[m, 2]` (height, width) of each image.

    Returns:
      The views, the length of a row, and the planned rows of each batch, with them
      filled.

    Raises:
      ValueError: if the model does not take the strategy's views, one extends beyond
        its position table, or a row needs more memory than is free.
    """
    views, row_tokens = checked_views(config, sizes, strategy)
    if not len(views.image):
        return views, row_tokens, iter(())
    filled = filled_batches(
        config,
        read,
        views.rows(row_tokens, _SLOTS),
        row_tokens,
        _SLOTS,
        resample=strategy.resample,
    )
    return views, row_tokens, filled


def checked_views(
    config: Config, sizes: np.ndarray, strategy: Strategy
) -> tuple[Views, int]:
    """The views of images, and the tokens of the longest view; 1 if there is none.

    Raises:
      ValueError: as `batches` does.
    """
    vision = config.model.vision
    if vision.fixed_grid:
        raise ValueError(
            "this model takes every image at one grid: load it with "
            "model.vision.fixed_grid=false to use a strategy"
        )
    views = views_of(strategy, sizes, patch_size=vision.patch_size)
    vision.position.check(views.grids)
    longest = int(views.grids.prod(-1).max(initial=1))
    check_budget(config, longest, len(views.grids))
    return views, longest


def add_views(out: np.ndarray, part: Rows, views: Views, vectors: np.ndarray) -> None:
    """Adds the vectors of planned views to the means of their images.

    A view's vector counts as often as the view has tokens.

    Args:
      out: `[images, e]`, changed in place.
      vectors: `[m, e]` of the planned views.
    """
    weights = part.lengths / views.tokens[part.index]
    np.add.at(out, part.index, (weights[:, None] * vectors).astype(np.float32))


def features(
    vision: Vision,
    config: Config,
    read: Callable[[int], Record],
    sizes: np.ndarray,
    strategy: Strategy,
    merger: Merger | None = None,
) -> Iterator[list[ViewFeatures] | ValueError | OSError]:
    """Yields each image's views with their tokens, merged or not, in order.

    In place of an image that is refused or unreadable, yields the error.

    Args:
      read, sizes: as in `batches`.
    """
    for start in range(0, len(sizes), _AT_ONCE):
        views, row_tokens, planned = batches(
            config,
            lambda i, start=start: read(start + i),  # type: ignore[misc]
            sizes[start : start + _AT_ONCE],
            strategy,
        )
        errors: dict[int, ValueError | OSError] = dict(views.refused)
        of_view: dict[int, np.ndarray | None] = {}
        for part, filled in planned:
            errors |= dict(filled.errors)
            tokens = tokens_of(vision, part, filled, row_tokens, merger)
            of_view |= zip(views.numbers(part), tokens, strict=True)
        for image, own_views in enumerate(views.of_image):
            if image in errors:
                yield errors[image]
                continue
            found = []
            for k, view in enumerate(own_views):
                own = of_view.pop(int(views.first[image]) + k)
                assert own is not None
                found.append(ViewFeatures(view, own))
            yield found
