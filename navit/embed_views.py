"""Images -> vectors and features, by a resolution strategy (`navit.strategies`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from navit.config import Config
from navit.embed_batches import check_budget, filled_batches
from navit.embed_rows import tokens_of, vectors_of
from navit.input.fill import Filled
from navit.model.vision import Vision
from navit.plan.rows import Rows
from navit.plan.strategies import Strategy, View
from navit.plan.view_rows import Views, views_of
from navit.sources.images import ArrayLike, ImageLike, image_name, sizes_of
from navit.sources.source import Record

# The most views in a row.
_SLOTS = 8

# The most images whose features are held at a time.
_AT_ONCE = 16


class ViewFeatures(NamedTuple):
    """A view of an image, and its tokens: float32 `[rows, columns, d]`."""

    view: View
    tokens: np.ndarray


def vectors(
    vision: Vision,
    config: Config,
    images: Sequence[ImageLike] | ArrayLike,
    strategy: Strategy,
) -> np.ndarray:
    """One vector an image, `[len, e]`, of unit norm: the mean of its views' vectors.

    A view's pooled vector counts as often as the view has tokens.
    """
    everything = range(len(images))
    views, row_tokens = _planned(config, images, strategy, everything)
    by_view = [np.zeros(0)] * len(views.image)
    for part, filled in _batches(
        config, images, strategy, views, row_tokens, everything
    ):
        pooled = vectors_of(vision, part, filled, row_tokens, normalized=False)
        for number, vector in zip(views.numbers(part), pooled, strict=True):
            by_view[number] = vector
    weighted = np.stack(by_view) * views.grids.prod(-1)[:, None]
    sums = np.add.reduceat(weighted, views.first[:-1], axis=0)
    norms = np.linalg.norm(sums, axis=-1, keepdims=True)
    return (sums / np.maximum(norms, 1e-6)).astype(np.float32)


def features(
    vision: Vision,
    config: Config,
    images: Sequence[ImageLike] | ArrayLike,
    strategy: Strategy,
) -> Iterator[list[ViewFeatures]]:
    """Yields each image's views with their tokens, in order."""
    for start in range(0, len(images), _AT_ONCE):
        some = range(start, min(start + _AT_ONCE, len(images)))
        views, row_tokens = _planned(config, images, strategy, some)
        of_view: dict[int, np.ndarray] = {}
        for part, filled in _batches(config, images, strategy, views, row_tokens, some):
            tokens = tokens_of(vision, part, filled, row_tokens)
            of_view |= zip(views.numbers(part), tokens, strict=True)
        for first, own_views in zip(views.first.tolist(), views.of_image, strict=False):
            yield [
                ViewFeatures(view, of_view.pop(first + k))
                for k, view in enumerate(own_views)
            ]


def _planned(
    config: Config,
    images: Sequence[ImageLike] | ArrayLike,
    strategy: Strategy,
    some: range,
) -> tuple[Views, int]:
    """The views of some images, and the length of a row: that of the longest view."""
    vision = config.model.vision
    if vision.fixed_grid:
        raise ValueError(
            "this model takes every image at one grid: load it with "
            "model.vision.fixed_grid=false to use a strategy"
        )
    views = views_of(
        strategy,
        sizes_of([images[i] for i in some]),
        patch_size=vision.patch_size,
        name=lambda i: image_name(images, some[i]),
    )
    vision.position.check(views.grids)
    row_tokens = int(views.grids.prod(-1).max())
    check_budget(config, row_tokens, len(views.grids))
    return views, row_tokens


def _batches(
    config: Config,
    images: Sequence[ImageLike] | ArrayLike,
    strategy: Strategy,
    views: Views,
    row_tokens: int,
    some: range,
) -> Iterator[tuple[Rows, Filled]]:
    """Planned rows of a batch, and the batch.

    Raises:
      ValueError: names the first image that cannot be read.
    """
    for part, filled in filled_batches(
        config,
        lambda i: Record(images[some[i]]),
        views.rows(row_tokens, _SLOTS),
        row_tokens,
        _SLOTS,
        resample=strategy.resample,
    ):
        for index, error in filled.errors:
            raise ValueError(
                f"{image_name(images, some[index])} cannot be read: {error}"
            ) from error
        yield part, filled
