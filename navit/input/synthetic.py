"""The offline dataset: drawn images of any size, each with something coarse and fine.

An image shows a large figure of one colour on a ground of another (seen at 64 tokens),
and over both a pattern of thin strokes (told apart with a hundred tokens where they are
wide, with a thousand where they are narrow). Captions name both, so accuracy on either
against the budget shows what tokens buy.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw

from navit.input.sources import Task

COLORS = {
    "red": (200, 40, 36),
    "green": (30, 130, 58),
    "blue": (40, 70, 200),
    "yellow": (226, 196, 30),
    "purple": (122, 40, 150),
    "orange": (232, 122, 22),
    "brown": (112, 72, 40),
    "gray": (128, 130, 134),
}
# All cover a third of the area, so that blurred they are the same.
PATTERNS = ("upright", "level", "rising", "falling", "dotted", "meshed")

# (figure, ground)
_PAIRS = list(itertools.permutations(COLORS, 2))

# The spacing of the strokes, as a share of the square root of the image's area. An
# image resized to N tokens of 16 pixels shows it 16 * sqrt(N) * share pixels wide: 1 to
# 4 at 64 tokens, 2 to 7 at 256, 5 to 15 at 1024. It takes about 4 to tell the patterns.
_SPACING = (1 / 110, 1 / 35)
# An image whose spacing would be less is left without: upscaling it could never bring
# back what its own pixels do not hold.
_MIN_SPACING = 5
_MIN_SIDE, _MAX_SIDE, _MAX_ASPECT = 64, 1024, 6.0


class SyntheticSource:
    """`size` drawn images, each a function of (seed, index) alone.

    Tasks: "coarse" (the two colours, 56 classes) and "fine" (the pattern, 6 classes; -1
    for an image too small to show it). The figure's shape and place mean nothing.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self._size, self._seed = size, seed
        traits = np.array([self._traits(i)[1:] for i in range(size)], np.int32)
        height, width, coarse, pattern, _ = traits.T
        self.sizes = np.stack([height, width], -1)
        self.tasks = {
            "coarse": Task(tuple(_coarse_name(*pair) for pair in _PAIRS), coarse),
            "fine": Task(tuple(map(_fine_name, PATTERNS)), pattern),
        }

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        *_, pair, pattern, _ = self._traits(index)
        coarse = _coarse_name(*_PAIRS[pair])
        if pattern < 0:
            return (coarse,)
        fine = _fine_name(PATTERNS[pattern])
        return coarse, fine, f"{coarse}, {fine}"

    def image(self, index: int) -> np.ndarray:
        """Draws image `index`: `[height, width, 3]` uint8."""
        rng, height, width, pair, pattern, spacing = self._traits(index)
        figure, ground = (
            tuple((np.array(COLORS[name]) + rng.integers(-18, 19, 3)).clip(0, 255))
            for name in _PAIRS[pair]
        )
        canvas = Image.new("RGB", (width, height), tuple(map(int, ground)))
        radius = min(height, width) * rng.uniform(0.3, 0.45)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        draw = ImageDraw.Draw(canvas)
        sides = int(rng.integers(3, 9))
        draw.regular_polygon(
            (x, y, radius), sides, int(rng.integers(360)), fill=tuple(map(int, figure))
        )
        if pattern >= 0:
            tile = _tile(PATTERNS[pattern], spacing)
            top, left = rng.integers(0, spacing, 2)
            strip = np.tile(tile, (1, width // spacing + 2))[:, left : left + width]
            mask = strip[(np.arange(height) + top) % spacing]
            ink = (0, 0, 0) if sum(ground) > 330 else (255, 255, 255)
            canvas.paste(ink, mask=Image.fromarray(mask))
        return np.asarray(canvas)

    def _traits(
        self, index: int
    ) -> tuple[np.random.Generator, int, int, int, int, int]:
        """(generator for the rest, height, width, pair, pattern or -1, spacing)."""
        if not 0 <= index < self._size:
            raise IndexError(f"image {index} of {self._size}")
        rng = np.random.default_rng([self._seed, index])
        pair, pattern = rng.integers((len(_PAIRS), len(PATTERNS)))
        root = math.exp(rng.uniform(math.log(160), math.log(800)))
        aspect = math.exp(rng.uniform(-1, 1) * math.log(_MAX_ASPECT))  # height / width
        # Where a side would leave its range the other keeps the aspect.
        root = min(root, _MAX_SIDE / math.sqrt(max(aspect, 1 / aspect)))
        root = max(root, _MIN_SIDE * math.sqrt(max(aspect, 1 / aspect)))
        height = round(root * math.sqrt(aspect))
        width = round(root / math.sqrt(aspect))
        share = math.exp(rng.uniform(*map(math.log, _SPACING)))
        spacing = round(math.sqrt(height * width) * share)
        if spacing < _MIN_SPACING:
            pattern = -1
        return rng, height, width, int(pair), int(pattern), spacing


def _coarse_name(figure: str, ground: str) -> str:
    return f"{figure} on {ground}"


def _fine_name(pattern: str) -> str:
    return f"{pattern} strokes"


@functools.cache
def _tile(pattern: str, spacing: int) -> np.ndarray:
    """One period of a pattern, `[spacing, spacing]` bool, a third of it True."""
    y, x = (np.indices((spacing, spacing)) + 0.5) / spacing
    third = 1 / 3
    if pattern == "upright":
        return x < third
    if pattern == "level":
        return y < third
    if pattern == "rising":
        return (x + y) % 1 < third
    if pattern == "falling":
        return (x - y) % 1 < third
    if pattern == "dotted":
        return (x < math.sqrt(third)) & (y < math.sqrt(third))
    line = 1 - math.sqrt(1 - third)
    return (x < line) | (y < line)
