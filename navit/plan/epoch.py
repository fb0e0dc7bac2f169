"""(sizes, seed, epoch) -> which image, at what grid, in which row: integers only.

An image's token count follows from its size and from draws made here, so rows are
packed before any pixel is read. Every host makes the same plan and reads its own rows
of it. An epoch is planned in blocks, so that a long one needs neither hours nor memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from navit.config import DataConfig
from navit.plan import geometry, groups, packing, sampling
from navit.plan.lanes import lanes_of, rows_in_window
from navit.plan.order import ORDER, Part, part_shares, records_at
from navit.plan.rows import Rows
from navit.plan.view_groups import plan_views, tokens_of

# Increased when the same config would give other rows; no run resumes across versions.
VERSION = 5

# The number of this kind of draw in the random key; see `ORDER`.
_DRAWS = 2

# A block has at least this many images and this many global batches.
_BLOCK_IMAGES, _BLOCK_BATCHES = 2**18, 64

# If the rate of dropped tokens follows a schedule, rows are shuffled only within this
# many global batches, so that they keep their place in it.
_SHUFFLED_BATCHES = 16


def plan_block(
    sizes: np.ndarray,
    data: DataConfig,
    *,
    patch_size: int,
    epoch: int,
    block: int = 0,
    lane: int = 0,
    parts: Sequence[Part] = (),
    slots: int | None = None,
    captions: int | None = None,
    block_images: int | None = None,
) -> Rows:
    """Plans one block of an epoch, or of a lane: a pure function of its arguments.

    With `data.strategy`, see `navit.plan.view_groups.plan_views`. Without:

    Takes the block's part of the epoch's order. For each image, draws a
    token budget (and a crop, a flip, the tokens to keep) and computes the grid. Then
    packs the images and shuffles the rows, or the batches with `budget_per="batch"`.
    Every `data.caption_rows` rows form a group; groups have about as many images each.

    Args:
      sizes: `[m, 2]` (height, width) of every image in pixels.
      lane: which of `data.lanes`; 0 without lanes.
      parts: the parts of a mixture, drawn by weight; empty takes every image once.
      slots: the most images in a row; None for no cap.
      captions: the most images in a group of rows; the others are left out.
      block_images: images in a block without lanes; None computes it from the sizes.
    """
    key = [data.seed, epoch, _DRAWS, block]
    if data.lanes:
        index, seen = lanes_of(data, parts, len(sizes)).order(epoch, block, lane)
        fill = False
        key.append(lane + 1)
    else:
        shares = part_shares(parts, len(sizes))
        total = sum(shares)
        size = block_images or images_per_block(sizes, data, patch_size)
        positions = np.arange(block * size, min((block + 1) * size, total))
        index = records_at(positions, parts, shares, [data.seed, epoch, ORDER])
        seen, fill = epoch * total + positions, total <= size
    rng = np.random.default_rng(key)
    own = np.asarray(sizes[index])  # read from a file, perhaps
    if data.strategy is not None:
        return plan_views(
            index,
            own,
            data,
            slots=slots,
            captions=captions,
            epoch=epoch,
            rng=rng,
        )

    budgets = sampling.token_budgets(rng, len(index), data, patch_size)
    drawn = draw(
        rng,
        own,
        budgets,
        data,
        patch_size=patch_size,
        seen=seen,
    )
    grids, kept, lengths = drawn.grids, drawn.kept, drawn.lengths
    cropped = own if drawn.boxes is None else drawn.boxes[:, 2:]

    def smaller(image: int, most: int) -> tuple[int, int]:
        return geometry.grid_for(
            *cropped[image].tolist(), patch_size=patch_size, max_tokens=most
        )

    def shrink(image: int, most: int, least: int) -> int:
        if kept is not None:
            return most
        rows, columns = smaller(image, most)
        return rows * columns if rows * columns >= max(least, data.min_tokens) else 0

    def pack(which: np.ndarray) -> list[list[int]]:
        numbers = which.tolist()
        packed, shrunk = packing.pack(
            lengths[which].tolist(),
            data.row_tokens,
            open_rows=data.open_rows,
            max_images=slots,
            elastic=data.elastic,
            shrink=lambda i, most, least: shrink(numbers[i], most, least),
        )
        for i, most in shrunk.items():
            if kept is not None:
                kept[numbers[i]] = most
            else:
                grids[numbers[i]] = smaller(numbers[i], most)
        return [[numbers[i] for i in row] for row in packed]

    if data.budget_per == "image":
        rows = pack(np.arange(len(index)))
        rows = _shuffled(rng, rows, data)
    else:
        batches = [
            batch
            for budget in sorted(set(data.budgets))
            for batch in _batches(
                rng, pack(np.flatnonzero(budgets == budget)), data, fill=fill
            )
        ]
        rows = [row for b in _order(rng, batches, data) for row in batches[b]]
    drawn = dataclasses.replace(drawn, index=index, epoch=epoch)
    if captions is not None and data.caption_rows:
        rows = groups.cut(rows, data.caption_rows, captions)
    return drawn.in_rows(rows)


def draw(
    rng: np.random.Generator,
    sizes: np.ndarray,
    budgets: np.ndarray,
    data: DataConfig,
    *,
    patch_size: int,
    seen: np.ndarray,
) -> Rows:
    """Draws crop, flip, grid and tokens to keep, for images not yet in rows.

    Args:
      sizes: `[m, 2]` (height, width) of each image.
      budgets: `[m]` token budget of each image.
      seen: `[m]` images trained on before each.
    """
    boxes = flips = kept = None
    if data.crop is not None:
        boxes = sampling.crop_boxes(rng, sizes, data.crop)
        sizes = boxes[:, 2:]
    if data.flip:
        flips = rng.random(len(sizes)) < 0.5
    grids = grids_of(sizes, budgets, data, patch_size)
    if data.drop is not None:
        kept = sampling.kept_tokens(
            rng,
            grids.prod(-1),
            data.drop,
            seen=seen,
            longest=data.most_tokens(patch_size),
        )
    return Rows(np.arange(1), np.arange(len(sizes)), grids, kept, boxes, flips)


def grids_of(
    sizes: np.ndarray, budgets: np.ndarray | int, data: DataConfig, patch_size: int
) -> np.ndarray:
    """Each image's grid at its budget, within the config's limits; int32 `[m, 2]`.

    Args:
      sizes: `[m, 2]` (height, width) of each image.
      budgets: `[m]` token budget of each image, or one for all.
    """
    if data.square:
        sizes = np.repeat(np.sqrt(np.prod(sizes, -1, float))[:, None], 2, -1)
    grids = geometry.grids_for(
        sizes, budgets, patch_size=patch_size, max_upscale=data.max_upscale
    )
    small = np.flatnonzero(grids.prod(-1) < data.min_tokens)
    if data.max_upscale is not None and small.size:
        grids[small] = geometry.grids_for(
            sizes[small],
            np.minimum(data.min_tokens, np.broadcast_to(budgets, len(sizes))[small]),
            patch_size=patch_size,
        )
    return grids


def sampled_sizes(sizes: np.ndarray, count: int) -> np.ndarray:
    """About `count` evenly spaced of `sizes` `[m, 2]`."""
    return sizes[:: max(1, len(sizes) // count)]


def typical_tokens(
    sizes: np.ndarray,
    data: DataConfig,
    patch_size: int,
    *,
    count: int,
    seen: float = 1.0,
) -> float:
    """Mean tokens per image, over about `count` evenly spaced images.

    Args:
      sizes: `[m, 2]` (height, width) of every image.
      seen: the share of each side that a crop leaves.
    """
    sample = np.maximum(1, sampled_sizes(sizes, count) * seen)
    rng = np.random.default_rng(0)
    budgets = sampling.token_budgets(rng, len(sample), data, patch_size)
    return float(grids_of(sample, budgets, data, patch_size).prod(-1).mean())


def mean_tokens(sizes: np.ndarray, data: DataConfig, patch_size: int) -> float:
    """Mean tokens per image of `sizes` `[m, 2]`, at the end of the drop schedule."""
    if data.strategy is not None:
        return tokens_of(sampled_sizes(sizes, 10_000), data)[0]
    seen = float(np.mean(data.crop.area)) ** 0.5 if data.crop else 1.0
    mean = typical_tokens(sizes, data, patch_size, count=10_000, seen=seen)
    return max(1.0, mean * (1 - data.drop.last_rate if data.drop else 1))


def images_per_block(sizes: np.ndarray, data: DataConfig, patch_size: int) -> int:
    """The number of images in a block of an epoch of `sizes` `[m, 2]`."""
    if len(sizes) <= _BLOCK_IMAGES:
        return _BLOCK_IMAGES
    mean = mean_tokens(sizes, data, patch_size)
    batch = round(data.rows * data.row_tokens / mean)
    return max(_BLOCK_IMAGES, _BLOCK_BATCHES * batch)


def _batches(
    rng: np.random.Generator, rows: list[list[int]], data: DataConfig, *, fill: bool
) -> list[list[list[int]]]:
    """Shuffles the rows of one budget and cuts them into batches; drops the rest.

    With `fill`, rows too few for one batch are padded with empty rows.
    """
    rows = _shuffled(rng, rows, data)
    if fill and 0 < len(rows) < data.rows:
        rows += [[]] * (data.rows - len(rows))
    return [
        rows[i : i + data.rows] for i in range(0, len(rows) - data.rows + 1, data.rows)
    ]


def _order(
    rng: np.random.Generator, batches: list[list[list[int]]], data: DataConfig
) -> list[int]:
    """A random order of batches; that of their images if tokens drop by schedule."""
    order = rng.permutation(len(batches)).tolist()
    if data.drop is None or not data.drop.changes:
        return order
    places = [np.mean([image for row in batch for image in row]) for batch in batches]
    return sorted(order, key=lambda batch: places[batch])


def _shuffled(
    rng: np.random.Generator, rows: list[list[int]], data: DataConfig
) -> list[list[int]]:
    counts = np.array([len(row) for row in rows], np.int64)
    window = max(1, len(rows))
    if data.lanes:  # what is read together is used together
        window = rows_in_window(window, int(counts.sum()), data)
    elif data.drop is not None and data.drop.changes:
        window = _SHUFFLED_BATCHES * data.rows
    return [
        rows[start + r]
        for start in range(0, len(rows), window)
        for r in groups.row_order(
            rng, counts[start : start + window], data.caption_rows
        )
    ]
