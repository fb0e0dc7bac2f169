"""The one batch type: images packed into rows of fixed length.

NaFlex is packing with one image per row, so both share this contract. Letters: `b`
rows, `n` tokens in a row, `s` slots in a row, `p` patch side, `d` width, `t` text
length; `g` groups of `b / g` rows each, with `c` places for captions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class PackedImages(NamedTuple):
    """Images packed into rows; numpy on the host, jax arrays on a device.

    Attributes:
      patches: `[b, n, p*p*3]` uint8 pixels in (row, column, channel) order, with 0 for
        padding; or float, already normalised to [-1, 1].
      segment_ids: `[b, n]` int32; 0 is padding, k the image in slot k-1 of its row.
      coords: `[b, n, 2]` int32 (row, column) of the patch in its image's grid.
      grids: `[b, s, 2]` int32 (rows, columns) of each slot's image; (0, 0) is empty.

    A slot may hold a whole video clip (`navit.pack_video`): then coords are
    (time, row, column) and grids (times, rows, columns), `[..., 3]`. A patch of several
    frames has their pixels frame by frame.
    """

    patches: Any
    segment_ids: Any
    coords: Any
    grids: Any

    def check(self) -> None:
        """Checks that the four arrays agree and that every image has all its tokens.

        For host arrays, never under jit.

        Raises:
          ValueError: names the field, its value and what is expected.
        """
        patches, segments, coords, grids = (np.asarray(x) for x in self)
        if patches.ndim != 3:
            raise ValueError(f"patches must be [b, n, p*p*3], not {patches.shape}")
        b, n, _ = patches.shape
        if patches.dtype != np.uint8 and not np.issubdtype(patches.dtype, np.floating):
            raise ValueError(f"patches must be uint8 or float, not {patches.dtype}")
        if segments.shape != (b, n):
            raise ValueError(f"segment_ids must be {(b, n)}, not {segments.shape}")
        axes = 3 if coords.shape == (b, n, 3) and grids.shape[-1:] == (3,) else 2
        if coords.shape != (b, n, axes):
            raise ValueError(f"coords must be {(b, n, 2)}, not {coords.shape}")
        if grids.ndim != 3 or grids.shape[0] != b or grids.shape[2] != axes:
            raise ValueError(f"grids must be [{b}, s, 2], not {grids.shape}")
        if (grids < 0).any():
            raise ValueError(f"grids must not be negative, but one has {grids.min()}")
        counts = tokens_per_slot(segments, grids.shape[1])
        if counts.sum() != (segments != 0).sum():
            raise ValueError(
                f"segment_ids range from {segments.min()} to {segments.max()}, but "
                f"grids has {grids.shape[1]} slots"
            )
        wrong = np.argwhere(counts != grids.prod(-1))
        if len(wrong):
            row, slot = wrong[0]
            raise ValueError(
                f"row {row} slot {slot} has {counts[row, slot]} tokens, but its grid "
                f"is {tuple(grids[row, slot].tolist())}"
            )
        row, token = np.nonzero(segments)
        own = grids[row, segments[row, token] - 1]
        at = coords[row, token]
        outside = np.flatnonzero(((at < 0) | (at >= own)).any(-1))
        if len(outside):
            i = outside[0]
            raise ValueError(
                f"coords of row {row[i]} token {token[i]} are {tuple(at[i].tolist())}, "
                f"outside their grid {tuple(own[i].tolist())}"
            )


class PackedTokens(NamedTuple):
    """`PackedImages` with a vector in place of each patch.

    Attributes:
      tokens: `[b, n, d]` float; 0 at padding.
      segment_ids, coords, grids: as in `PackedImages`, with coords of 0 at padding.
    """

    tokens: Any
    segment_ids: Any
    coords: Any
    grids: Any


class Batch(NamedTuple):
    """A training batch: packed images, their captions, and data for every slot.

    Captions come in one list per group of rows, so that the text tower does not run on
    empty slots, which most slots are. Slots with the same owner are views of one image;
    their vectors are averaged, each weighted by its tokens.

    Attributes:
      images: the packed images.
      text: `[g, c, t]` int32 token ids of captions.
      owner: `[b, s]` int32 place, among the captions of the row's group, of the caption
        that belongs to the slot's image; -1 = empty slot.
      label: `[b, s]` int32 class, -1 = none.
      id: `[b, s]` int64 index of the record in its source; -1 = empty slot. A slot with
        an id and an empty grid is for an image that could not be read. None on a
        device, where JAX would cut it to its lower 32 bits.
      size: `[b, s, 2]` int32 (height, width) of the image before any resize.
    """

    images: PackedImages
    text: Any
    owner: Any
    label: Any
    id: Any
    size: Any

    def check(self) -> None:
        """Checks that the slots with an image, and only those, own a caption.

        For host arrays, never under jit.

        Raises:
          ValueError: names the field, its value and what is expected.
        """
        text, owner, ids = (np.asarray(x) for x in (self.text, self.owner, self.id))
        slots = np.shape(self.images.grids)[:2]
        if text.ndim != 3 or not len(text) or slots[0] % len(text):
            raise ValueError(
                f"text must be [g, c, t] with g | {slots[0]}, not {text.shape}"
            )
        if owner.shape != slots or ids.shape != slots:
            raise ValueError(
                f"owner and id must be {slots}, not {owner.shape} and {ids.shape}"
            )
        wrong = np.argwhere((owner < 0) != (ids < 0))
        if len(wrong):
            row, slot = wrong[0]
            raise ValueError(
                f"row {row} slot {slot} has the id {ids[row, slot]} and the owner "
                f"{owner[row, slot]}: both are -1 in an empty slot, and only there"
            )
        if owner.size and not -1 <= owner.min() <= owner.max() < text.shape[1]:
            raise ValueError(
                f"owners are from {owner.min()} to {owner.max()}, and a group has "
                f"{text.shape[1]} captions"
            )


def tokens_per_slot(segment_ids: np.ndarray, slots: int) -> np.ndarray:
    """Counts each slot's tokens: `[b, n]` -> `[b, s]`."""
    slot_ids = np.arange(1, slots + 1)
    return np.stack([(row[:, None] == slot_ids).sum(0) for row in segment_ids])


def fill(images: PackedImages) -> float:
    """Share of tokens that are not padding."""
    return float((np.asarray(images.segment_ids) > 0).mean())
