"""What a reader of the table must know: how a budget differs from training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from navit.compare.candidates import label
from navit.config import Config
from navit.embed_batches import grids_of

# (height, width) in pixels, and height in inches.
_PAGES = (
    ("letter page, 200 dpi", (2200, 1700), 11.0),
    ("A4 page, 300 dpi", (3508, 2480), 11.69),
    ("slide, 144 dpi", (1080, 1920), 7.5),
)


class Page(NamedTuple):
    """What a page becomes at a budget: `grid` and `pixels` are (height, width)."""

    name: str
    budget: int
    grid: tuple[int, int]
    pixels: tuple[int, int]
    dpi: int


def notes(config: Config, trained: Config, budget: int, *, step: int) -> list[str]:
    """How an evaluation at this budget differs from the training of the weights.

    Args:
      trained: the config that the checkpoint has, or the released weights.
      step: 0 for weights that do not say at which budgets they were trained.
    """
    vision, was = config.model.vision, trained.model.vision
    lines = []
    if vision.fixed_grid:
        side = vision.position.size
        lines.append(
            f"one fixed resolution: every image is resized to {side}x{side} patches, "
            "without its aspect"
        )
    elif was.fixed_grid:
        side = was.position.size
        lines.append(
            f"trained at one fixed resolution, {side}x{side} patches, and evaluated "
            "with each image's aspect"
        )
    elif config.data.strategy is not None:
        lines.append(f"views by {strategy_of(config)}")
        if trained.data.strategy != config.data.strategy:
            lines.append(f"trained by {strategy_of(trained) or 'token budgets'}")
    elif trained.data.strategy is not None:
        lines.append(f"trained by {strategy_of(trained)}, and evaluated without it")
    elif step == 0:
        lines.append("the weights do not say at which budgets they were trained")
    elif text := _untrained(trained, budget):
        lines.append(text)
    if config.data.square != trained.data.square and not vision.fixed_grid:
        seen = [
            "as a square" if c.data.square else "with its aspect"
            for c in (trained, config)
        ]
        lines.append(f"trained with each image {seen[0]}, and evaluated {seen[1]}")
    tokenizers = [c.model.text and c.model.text.tokenizer for c in (trained, config)]
    if tokenizers[0] is None and tokenizers[1] is not None:
        lines.append(
            f"tokenizer {tokenizers[1]}; the weights do not say which one they were "
            "trained with"
        )
    elif tokenizers[0] != tokenizers[1]:
        lines.append(f"tokenizer {tokenizers[1]}, and the weights have {tokenizers[0]}")
    return lines


def strategy_of(config: Config) -> str | None:
    """The config's strategy, as `navit embed --strategy` takes it."""
    return label(config.data.strategy) if config.data.strategy else None


def pages(config: Config, budget: int) -> list[Page]:
    """What a few typical pages become at a budget, without a strategy."""
    vision = config.model.vision
    sizes = np.array([size for _, size, _ in _PAGES])
    grids = grids_of(config, sizes, budget)
    return [
        Page(
            name,
            budget,
            (rows, columns),
            (rows * vision.patch_size, columns * vision.patch_size),
            round(rows * vision.patch_size / inches),
        )
        for (name, _, inches), (rows, columns) in zip(
            _PAGES, grids.tolist(), strict=True
        )
    ]


def _untrained(trained: Config, budget: int) -> str | None:
    """A note for a budget that training did not have."""
    sides, patch = trained.data.sides, trained.model.vision.patch_size
    if sides is not None:
        low, high = (round((x / patch) ** 2) for x in (sides.low, sides.high))
        if low <= budget <= high:
            return None
        return f"never trained at {_tokens(budget)}, but at {low} to {high}"
    if budget in trained.data.budgets:
        return None
    known = ", ".join(map(str, sorted({*trained.data.budgets})))
    return f"never trained at {_tokens(budget)}, but at {known}"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
