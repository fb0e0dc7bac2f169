"""The offline dataset: drawn images of any size, each with something coarse and fine.

An image shows a large figure of one colour on a ground of another (seen at 64 tokens).
The larger ones, nearly half, also show one letter, tiny and repeated (readable with
several hundred tokens).
Captions name both, so accuracy on either against the budget shows what tokens buy.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
LETTERS = "ILOXTHEV"

# (figure, ground)
_PAIRS = list(itertools.permutations(COLORS, 2))

# The height of a letter, as a share of the square root of the image's area. An image
# resized to N tokens of 16 pixels shows it 16 * sqrt(N) / 56 pixels high: 2 at 64
# tokens, 5 at 256, 8 at 729, 9 at 1024.
_LETTER_SHARE = 1 / 56
# An image whose letters would be smaller than this is left without: upscaling it could
# never bring back what its own pixels do not hold.
_LETTER_MIN_PIXELS = 7.0
_MIN_SIDE, _MAX_SIDE, _MAX_ASPECT = 64, 1024, 6.0


class SyntheticSource:
    """`size` drawn images, each a function of (seed, index) alone.

    Tasks: "coarse" (the two colours, 56 classes) and "fine" (the letter, 8 classes; -1
    for an image too small to show one). The figure's shape and place mean nothing.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self._size, self._seed = size, seed
        traits = np.array([self._traits(i)[1:] for i in range(size)], np.int32)
        height, width, coarse, letter = traits.T
        self.sizes = np.stack([height, width], -1)
        self.tasks = {
            "coarse": Task(tuple(_coarse_name(*pair) for pair in _PAIRS), coarse),
            "fine": Task(tuple(f"letter {x.lower()}" for x in LETTERS), letter),
        }

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        *_, pair, letter = self._traits(index)
        coarse = _coarse_name(*_PAIRS[pair])
        if letter < 0:
            return (coarse,)
        fine = f"letter {LETTERS[letter].lower()}"
        return coarse, fine, f"{coarse}, {fine}"

    def image(self, index: int) -> np.ndarray:
        """Draws image `index`: `[height, width, 3]` uint8."""
        rng, height, width, pair, letter = self._traits(index)
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
        if letter >= 0:
            pixels = math.sqrt(height * width) * _LETTER_SHARE
            tile = _letter_tile(LETTERS[letter], round(pixels))
            top, left = rng.integers(0, len(tile), 2)
            strip = np.tile(tile, (1, width // len(tile) + 2))[:, left : left + width]
            mask = strip[(np.arange(height) + top) % len(tile)]
            ink = (0, 0, 0) if sum(ground) > 330 else (255, 255, 255)
            canvas.paste(ink, mask=Image.fromarray(mask))
        return np.asarray(canvas)

    def _traits(self, index: int) -> tuple[np.random.Generator, int, int, int, int]:
        """(generator for the rest, height, width, pair of colours, letter or -1)."""
        if not 0 <= index < self._size:
            raise IndexError(f"image {index} of {self._size}")
        rng = np.random.default_rng([self._seed, index])
        pair, letter = rng.integers((len(_PAIRS), len(LETTERS)))
        root = math.exp(rng.uniform(math.log(160), math.log(800)))
        aspect = math.exp(rng.uniform(-1, 1) * math.log(_MAX_ASPECT))  # height / width
        # Where a side would leave its range the other keeps the aspect.
        root = min(root, _MAX_SIDE / math.sqrt(max(aspect, 1 / aspect)))
        root = max(root, _MIN_SIDE * math.sqrt(max(aspect, 1 / aspect)))
        height = round(root * math.sqrt(aspect))
        width = round(root / math.sqrt(aspect))
        if math.sqrt(height * width) * _LETTER_SHARE < _LETTER_MIN_PIXELS:
            letter = -1
        return rng, height, width, int(pair), int(letter)


def _coarse_name(figure: str, ground: str) -> str:
    return f"{figure} on {ground}"


@functools.cache
def _letter_tile(letter: str, pixels: int) -> np.ndarray:
    """A square tile of one letter, `pixels` high in a space twice that, as a mask."""
    font = ImageFont.load_default(size=pixels / 0.7)  # capitals are 0.7 em high
    side = 2 * pixels
    tile = Image.new("L", (side, side))
    middle = (side / 2, side / 2)
    ImageDraw.Draw(tile).text(middle, letter, fill=255, font=font, anchor="mm")
    return np.asarray(tile) > 127
