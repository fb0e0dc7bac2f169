"""Plans a dataset at several row lengths: a table and a plot."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from navit.config import DataConfig
from navit.files import write_atomic
from navit.plan.batches import BatchPlans, LeftOut, Statistics
from navit.plan.epoch import typical_tokens
from navit.plan.order import Part

# Below this share of padding, one image per row is as good, and simpler.
_LITTLE = 0.02


class Report(NamedTuple):
    """Attributes:
    lines: one for each row length.
    alone: padding with one image per row, and rows as long as the largest budget; None
      with a strategy, which has no budget.
    lengths: `[m]` tokens of each image, or view, of an epoch's first block.
    left_out: the images that a strategy leaves out at the config's row length.
    """

    lines: list[Statistics]
    alone: float | None
    lengths: np.ndarray
    left_out: LeftOut | None


def report(
    sizes: np.ndarray,
    data: DataConfig,
    *,
    patch_size: int,
    row_lengths: Sequence[int],
    parts: Sequence[Part] = (),
) -> Report:
    """Plans the first block of an epoch in rows of every length.

    A global batch keeps its number of tokens: twice the row length means half the rows.
    `slots` and `captions` are the config's at its own row length, and chosen for the
    others as for None. The captions column is the share of the text tower's work that
    is real.

    Args:
      sizes: `[m, 2]` (height, width) of every image.

    Raises:
      ValueError: if the longest image does not fit a row.
    """
    most = data.most_tokens(patch_size)
    lines = []
    for row_tokens in sorted({*row_lengths, data.row_tokens}):
        if row_tokens < most:
            raise ValueError(
                f"a row of {row_tokens} tokens is shorter than an image of {most}"
            )
        own = row_tokens == data.row_tokens
        rows = max(1, data.rows * data.row_tokens // row_tokens)
        lanes = math.gcd(data.lanes, rows) if data.lanes else 0
        lane_rows = rows // (lanes or 1)
        changed = dataclasses.replace(
            data,
            row_tokens=row_tokens,
            rows=rows,
            slots=data.slots if own else None,
            lanes=lanes,
            workers=0,  # they change no plan
            caption_rows=data.caption_rows and math.gcd(data.caption_rows, lane_rows),
            captions=data.captions if own else None,
        )
        plans = BatchPlans(sizes, changed, patch_size=patch_size, steps=1, parts=parts)
        lines.append(plans.statistics())
        if own:
            lengths = plans.first_block()[0].lengths
            left_out = plans.left_out()
    alone = None
    if data.strategy is None:
        alone = 1 - typical_tokens(sizes, data, patch_size, count=100_000) / most
    return Report(lines, alone, lengths, left_out)


def table(result: Report, row_tokens: int) -> str:
    """The report as text; the config's own row length is marked."""
    heads = (
        "padding",
        "images/row",
        "slots",
        "slots filled",
        "captions",
        "steps/epoch",
    )
    text = "row tokens  " + "  ".join(heads) + "  left out\n"
    for line in result.lines:
        mark = "*" if line.row_tokens == row_tokens else " "
        cells = (
            f"{line.row_tokens:9}{mark}",
            f"{line.padding:8.2%}",
            f"{line.images_per_row:10.1f}",
            f"{line.slots:5}",
            f"{line.slots_filled:12.0%}",
            f"{line.captions_filled:8.0%}",
            f"{line.steps_per_epoch:11}",
            f"{line.left_out:8.1%}",
        )
        text += "  ".join(cells) + "\n"
    if result.alone is None:
        return text
    text += (
        f"one image per row, padded to the largest budget: {result.alone:.2%} padding\n"
    )
    if result.alone < _LITTLE:
        text += (
            "Packing will not help here: every image at its budget already pads under "
            "2 %. Set data.slots=1 and data.row_tokens to the budget.\n"
        )
    return text


def plot(result: Report, path: Path) -> None:
    """Plots padding by row length, and the lengths of the images."""
    from matplotlib.figure import Figure  # slow to import, and only used here

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(line.row_tokens) for line in result.lines]
    shares = [line.padding for line in result.lines]
    segment = "view"
    if result.alone is not None:
        names, shares = ["1 image\nper row", *names], [result.alone, *shares]
        segment = "image"
    bars = left.bar(names, [100 * x for x in shares], color="#4477aa")
    left.bar_label(bars, fmt="%.2g", fontsize=8)
    left.set(xlabel="row length (tokens)", ylabel="padding (%)")
    right.hist(result.lengths, bins=60, color="#4477aa")
    right.set(xlabel=f"tokens per {segment}", ylabel=f"{segment}s")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
