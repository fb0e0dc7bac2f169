"""Planned rows: which segments lie in each row, and what each shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from navit.plan import packing


@dataclasses.dataclass(frozen=True)
class Rows:
    """Planned rows of segments: an image each, or one of its views.

    Row r holds segments `offsets[r]` to `offsets[r+1]`, slot by slot.

    Attributes:
      offsets: `[b + 1]` int64.
      index: `[m]` int64, the record of each segment's image in the source.
      grids: `[m, 2]` int32 (rows, columns) of patches.
      kept: `[m]` int64 tokens kept of each segment; None keeps all.
      boxes: `[m, 4]` int32 (top, left, height, width) of each image's crop, in upright
        pixels; None takes the whole image.
      flips: `[m]` bool, whether to mirror left to right; None mirrors none.
      views: `[m]` of `navit.plan.view_rows.VIEW`, what each segment shows of its image;
        None shows the whole image, at its grid.
      epoch: the rows' epoch; draws outside the plan (which of several captions) depend
        on it.
    """

    offsets: np.ndarray
    index: np.ndarray
    grids: np.ndarray
    kept: np.ndarray | None = None
    boxes: np.ndarray | None = None
    flips: np.ndarray | None = None
    views: np.ndarray | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def images(self) -> int:
        """The number of images; each has one segment, or one for each of its views."""
        if self.views is None:
            return len(self.index)
        return int((self.views["number"] == 0).sum())

    @property
    def lengths(self) -> np.ndarray:
        """`[m]` tokens that each image, or each view, takes."""
        return self.grids.prod(-1) if self.kept is None else self.kept

    def slice(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`; rows past the end are empty."""
        offsets = self.offsets[np.minimum(np.arange(start, stop + 1), len(self))]
        return self._some(offsets - offsets[0], slice(offsets[0], offsets[-1]))

    def in_rows(self, rows: list[list[int]]) -> Rows:
        """These segments in other rows: `rows` has the numbers of those in each row."""
        offsets = np.cumsum([0, *map(len, rows)])
        return self._some(
            offsets, np.array([number for row in rows for number in row], np.int64)
        )

    def _some(self, offsets: np.ndarray, segments: Any) -> Rows:
        """Some of these segments (a slice or indices), with new offsets."""

        def chosen(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[segments]

        return Rows(
            offsets,
            self.index[segments],
            self.grids[segments],
            chosen(self.kept),
            chosen(self.boxes),
            chosen(self.flips),
            chosen(self.views),
            self.epoch,
        )


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other; all are of one epoch."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.index) for part in parts[:-1])])
    pairs = zip(parts, starts, strict=True)
    offsets = [part.offsets[1:] + start for part, start in pairs]

    def together(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    return Rows(
        np.concatenate([[0], *offsets]),
        together("index"),
        together("grids"),
        together("kept"),
        together("boxes"),
        together("flips"),
        together("views"),
        parts[0].epoch,
    )


def pack_rows(grids: np.ndarray, row_tokens: int, slots: int | None) -> Rows:
    """Packs images, given in order by their grids `[m, 2]`, into rows."""
    rows, _ = packing.pack(grids.prod(-1).tolist(), row_tokens, max_images=slots)
    return Rows(np.arange(1), np.arange(len(grids)), grids).in_rows(rows)
