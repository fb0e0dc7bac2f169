"""Images -> their tokens at a token budget, in order and a few batches at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from navit.config import Config
from navit.embed_batches import batches, budget_of, rows_at_once, slots_of
from navit.embed_rows import tokens_of
from navit.model.merger import Merger
from navit.model.vision import Vision
from navit.sources.source import Record


def by_budget(
    vision: Vision,
    config: Config,
    read: Callable[[int], Record],
    sizes: np.ndarray,
    max_tokens: int,
    merger: Merger | None = None,
) -> Iterator[np.ndarray | ValueError | OSError]:
    """Yields each image's tokens, `[rows, columns, d]`, merged or not, or its error.

    `navit.embed_views.features` does the same by a strategy.

    Args:
      read, sizes, max_tokens: as in `navit.embed_batches.batches`.
    """
    max_tokens = budget_of(config, max_tokens)
    window = slots_of(config) * rows_at_once(config, max_tokens, max(len(sizes), 1))

    def few(start: int) -> Iterator[np.ndarray | ValueError | OSError]:
        found: dict[int, Any] = {}
        for part, filled in batches(
            config,
            lambda i: read(start + i),
            sizes[start : start + window],
            max_tokens,
        ):
            tokens = tokens_of(vision, part, filled, max_tokens, merger)
            found |= zip(part.index.tolist(), tokens, strict=True)
            found |= dict(filled.errors)
        for i in range(len(found)):
            yield found.pop(i)

    return itertools.chain.from_iterable(
        few(start) for start in range(0, len(sizes), window)
    )
