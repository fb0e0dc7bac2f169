"""The offline dataset: drawn images of any size, with coarse and fine features.

An image shows a large figure of one colour on a grey background (visible at 64 tokens),
and a few dots of another colour, wide in some images and tiny in others (2 pixels at 64
tokens, 6 at 1024). Captions name both, so accuracy on each at several budgets shows
what more tokens buy.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageDraw

from navit.sources.source import Record, Task

COLORS = {
    "red": (200, 40, 36),
    "green": (30, 130, 58),
    "blue": (40, 70, 200),
    "yellow": (226, 196, 30),
    "purple": (122, 40, 150),
    "orange": (232, 122, 22),
    "brown": (112, 72, 40),
}
_GROUND = (60, 200)  # the range of greys
DOTS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "pink": (255, 90, 190),
    "cyan": (0, 235, 235),
    "lime": (150, 255, 0),
}

# The diameter of a dot, as a share of the square root of the image's area. An image
# resized to N tokens of 16 pixels shows it 16 * sqrt(N) * share pixels wide: 2 to 21 at
# 64 tokens, 3 to 43 at 256, 6 to 85 at 1024. The widest teach the rest: with only small
# dots, a model that knows the figures maps all dots' captions to one vector.
_DIAMETER = (1 / 80, 1 / 6)
# Dots below this share are "finest": at most 4 pixels wide at 64 tokens.
_SMALL = 1 / 32
# An image whose dots would be smaller has none: upscaling cannot restore lost pixels.
_MIN_DIAMETER = 4
_MIN_SIDE, _MAX_SIDE = 64, 1024


class SyntheticSource:
    """`size` drawn images, each a function of only (seed, index).

    Tasks: "coarse" (the figure's colour, 7 classes), "fine" (the dots' colour, 5
    classes; -1 for an image whose dots would be less than 4 pixels wide, which has
    none), and "finest", the same for images with small dots only (-1 elsewhere).
    Shapes and positions carry no label.

    Args:
      task: the one that comes first, and so labels training batches.
      aspect: the range of the longer side over the shorter.
    """

    left_out = damaged = 0

    def __init__(
        self,
        size: int,
        seed: int = 0,
        *,
        task: str = "coarse",
        aspect: tuple[float, ...] = (1.0, 6.0),
    ) -> None:
        self._size, self._seed = size, seed
        self._task, self._aspect = task, aspect
        traits = np.array([self._traits(i)[1:] for i in range(size)], np.int32)
        height, width, coarse, dots, diameter = traits.T
        small = diameter < _SMALL * np.sqrt(height * width)
        self.sizes = np.stack([height, width], -1)
        tasks = {
            "coarse": Task(tuple(COLORS), coarse),
            "fine": Task(tuple(map(_fine_name, DOTS)), dots),
            "finest": Task(tuple(map(_fine_name, DOTS)), np.where(small, dots, -1)),
        }
        self.tasks = {task: tasks.pop(task), **tasks}

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.sizes, "<i4").tobytes())
        task = "" if self._task == "coarse" else f", task {self._task}"
        return f"{self._size} drawn images (sizes {digest.hexdigest()[:16]}{task})"

    def version(self) -> str:
        return f"seed {self._seed}"

    def record(self, index: int) -> Record:
        """Draws image `index`, `[height, width, 3]` uint8, and names its colours."""
        rng, height, width, figure, dots, diameter = self._traits(index)
        coarse = list(COLORS)[figure]
        captions: tuple[str, ...] = (coarse,)
        color = np.array(list(COLORS.values())[figure]) + rng.integers(-18, 19, 3)
        fill = tuple(color.clip(0, 255).tolist())
        ground = (int(rng.integers(*_GROUND)),) * 3
        canvas = Image.new("RGB", (width, height), ground)
        radius = min(height, width) * rng.uniform(0.3, 0.45)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        draw = ImageDraw.Draw(canvas)
        sides = int(rng.integers(3, 9))
        draw.regular_polygon((x, y, radius), sides, int(rng.integers(360)), fill=fill)
        if dots >= 0:
            fine = _fine_name(list(DOTS)[dots])
            captions = coarse, fine, f"{coarse}, {fine}"
            fill = list(DOTS.values())[dots]
            for _ in range(rng.integers(6, 13)):
                left, top = rng.integers(0, (width - diameter, height - diameter))
                box = (left, top, left + diameter - 1, top + diameter - 1)
                draw.ellipse(tuple(map(int, box)), fill=fill)
        return Record(np.asarray(canvas), captions)

    def _traits(
        self, index: int
    ) -> tuple[np.random.Generator, int, int, int, int, int]:
        """(generator for the rest, height, width, figure, dots or -1, diameter)."""
        if not 0 <= index < self._size:
            raise IndexError(f"image {index} of {self._size}")
        rng = np.random.default_rng([self._seed, index])
        figure, dots = rng.integers((len(COLORS), len(DOTS)))
        root = math.exp(rng.uniform(math.log(160), math.log(800)))
        side = rng.uniform(-1, 1)
        low, high = map(math.log, self._aspect)
        log_aspect = math.copysign(low + abs(side) * (high - low), side)
        aspect = math.exp(log_aspect)  # height / width
        # Both sides scale together to stay in range, which keeps the aspect.
        root = min(root, _MAX_SIDE / math.sqrt(max(aspect, 1 / aspect)))
        root = max(root, _MIN_SIDE * math.sqrt(max(aspect, 1 / aspect)))
        height = round(root * math.sqrt(aspect))
        width = round(root / math.sqrt(aspect))
        low, high = _DIAMETER
        share = math.exp(rng.uniform(math.log(low), math.log(high)))
        diameter = round(math.sqrt(height * width) * share)
        if diameter < _MIN_DIAMETER:
            dots = -1
        return rng, height, width, int(figure), int(dots), diameter


def _fine_name(color: str) -> str:
    return f"{color} dots"


_ASPECTS = (9 / 16, 2 / 3, 3 / 4, 1, 1, 4 / 3, 4 / 3, 4 / 3, 3 / 2, 16 / 9)


def photographs(count: int) -> np.ndarray:
    """(height, width) of simulated photographs, int `[count, 2]`.

    Ten aspects from 9:16 to 16:9; long sides log-normal around 480 pixels.
    """
    rng = np.random.default_rng(0)
    aspect = rng.choice(_ASPECTS, count) * np.exp(rng.normal(0, 0.05, count))
    long = np.clip(480 * np.exp(rng.normal(0, 0.35, count)), 100, 2000)
    width = np.where(aspect > 1, long, long * aspect)
    return np.maximum(32, np.stack([width / aspect, width], -1)).astype(np.int64)
