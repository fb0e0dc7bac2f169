"""The data part of a configuration (`navit/config/experiment.py`)."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist
from typing import ClassVar, Literal

from navit.config.overrides import positive
from navit.config.sources import STREAM, AnySource, Synthetic
from navit.plan.strategies import Strategy


@dataclasses.dataclass(frozen=True)
class Sides:
    """NaViT's resolution sampling: every image gets the area of a drawn square.

    The square's side in pixels (`of="side"`) or its area is drawn between `low` and
    `high`: uniformly, or from a normal truncated to [-1, 1] and stretched to the range.
    NaViT found sides better than areas, and N(-0.5, 1) on [64, 384] best.
    """

    of: Literal["side", "area"] = "side"
    distribution: Literal["uniform", "truncated_normal"] = "truncated_normal"
    low: int = 64
    high: int = 384
    mean: float = -0.5
    std: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "low", "std")
        if self.high < self.low:
            raise ValueError(f"high={self.high} is less than low={self.low}")
        normal = NormalDist(self.mean, self.std)
        if not normal.cdf(1) - normal.cdf(-1) > 0.01:
            raise ValueError(
                f"a normal with mean={self.mean} and std={self.std} has hardly any "
                "mass in [-1, 1], the range that is stretched to low and high"
            )


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random crop of every image, before its grid is computed.

    `area`: range of the crop's share of the image's area. `aspect`: range of its width
    over height, relative to the image's own (uniform on a logarithmic scale).
    """

    area: tuple[float, ...] = (0.5, 1.0)
    aspect: tuple[float, ...] = (0.75, 4 / 3)

    def __post_init__(self) -> None:
        for name, top in (("area", 1.0), ("aspect", float("inf"))):
            span = getattr(self, name)
            if len(span) != 2 or not 0 < span[0] <= span[1] <= top:
                raise ValueError(f"{name} must be a range, as (0.5, 1.0), not {span}")


@dataclasses.dataclass(frozen=True)
class TokenDrop:
    """Drops tokens of every image in training (NaViT, continuous token dropping).

    `kind`: drop the share `rate` of each image ("constant"); a Beta-distributed share
    with that mean and at most `most` ("beta"); or a share that rises with the image's
    length, from `rate - delta` to `rate + delta` ("resolution").
    With `final_rate`, the rate moves from `rate` to `final_rate` along a sigmoid in the
    number of images seen, half way at `midpoint` images and `timescale` images wide.
    NaViT found that dropping fewer tokens towards the end helps, and more hurts.
    """

    kind: Literal["constant", "beta", "resolution"] = "resolution"
    rate: float = 0.5
    final_rate: float | None = None
    midpoint: float = 0.0
    timescale: float = 1.0
    delta: float = 0.1
    most: float = 0.85

    def __post_init__(self) -> None:
        positive(self, "timescale", "most")
        top = self.most if self.kind == "beta" else 1.0
        for name, rate in (("rate", self.rate), ("final_rate", self.last_rate)):
            if not 0 <= rate < top or top > 1:
                raise ValueError(f"{name} must be in [0, {top:g}), not {rate}")
        low, high = sorted((self.rate, self.last_rate))
        if (
            self.kind == "resolution"
            and not 0 <= low - abs(self.delta) <= (high + abs(self.delta)) < 1
        ):
            raise ValueError(
                f"delta={self.delta} takes rates from {low} to {high} out of [0, 1)"
            )
        if not math.isfinite(self.midpoint):
            raise ValueError(
                f"midpoint must be a number of images, not {self.midpoint}"
            )

    @property
    def changes(self) -> bool:
        """Whether the rate follows a schedule."""
        return self.rate != self.last_rate

    @property
    def last_rate(self) -> float:
        """The rate at the end of the schedule."""
        return self.rate if self.final_rate is None else self.final_rate


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data to read, and how to pack it.

    A global batch is `rows` rows of `row_tokens` tokens, with at most `slots` images
    each (None: twice the mean number of images in a row, to a power of two).

    Every image gets one of `budgets` (in tokens), drawn again each epoch by
    `budget_weights` (empty: evenly); `budget_per="batch"` draws one for each global
    batch, as SigLIP 2 does. `sides` instead draws resolutions, as NaViT does.
    `square` takes the aspect from every image: it is resized to a square grid within
    its budget, as in a plain ViT.
    `max_upscale` caps how much a small image is enlarged (None: as much as the budget
    allows, SigLIP 2's own rule; 1.0: native resolution, never enlarged), except that
    every image gets at least `min_tokens`.

    The text tower takes the captions of `caption_rows` rows as one list of `captions`
    places (None: a few per cent more than such rows hold on average), so that it does
    not run on empty slots; the plan keeps the number of images within these places.
    Every device takes whole groups, so `rows` must be a multiple of devices times
    `caption_rows`; 4 to 8 is enough. `caption_rows=None`: every slot has a place.

    `strategy` makes one view or several of each image, as a vision-language model does
    (`navit.strategies`), in place of budgets and all other settings of resolution. Each
    view is a segment. All views of an image lie in one group of `caption_rows` rows,
    and their vectors are averaged; an image that does not fit a group is left out.

    `crop`, `flip` and `drop` change how an image is seen, in training only.
    `elastic`: an image may give up this share of its tokens to close a row, which
    pads less and biases resolution downwards; off at 0.
    `lanes`: an epoch is a random order of chunks of `chunk` neighbouring records (in
    Parquet, of whole row groups), which are dealt to this many lanes. A lane shuffles
    the records of `window` chunks at a time, and packs `rows / lanes` rows of every
    batch. A host plans only its own lanes, and reads each of their chunks once, in one
    piece. This is for data behind a URL, and for more images than one host should plan.
    A run can go on with any number of hosts that divides `lanes`. 0: one random order
    of all images, which ignores `chunk` and `window`.
    `workers` is the number of decoding processes; 0 decodes in threads of this process.
    `cache` is a folder on this machine that keeps what is read behind URLs, up to
    `cache_gib` GiB; processes may share it. None keeps nothing.
    """

    # Former kinds of source, for the error that an override with one gets.
    removed: ClassVar = {"stream": STREAM}

    train: AnySource = Synthetic()
    eval: AnySource | None = None
    budgets: tuple[int, ...] = (256,)
    budget_weights: tuple[float, ...] = ()
    budget_per: Literal["image", "batch"] = "image"
    sides: Sides | None = None
    min_tokens: int = 1
    square: bool = False
    max_upscale: float | None = None
    row_tokens: int = 1024
    rows: int = 8
    slots: int | None = None
    caption_rows: int | None = None
    captions: int | None = None
    open_rows: int = 16
    elastic: float = 0.0
    strategy: Strategy | None = None
    crop: Crop | None = None
    flip: bool = False
    drop: TokenDrop | None = None
    dct: Literal["fast", "accurate"] = "fast"
    seed: int = 0
    lanes: int = 0
    chunk: int = 128
    window: int = 8
    workers: int = 0
    cache: str | None = None
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        positive(self, "row_tokens", "rows", "open_rows", "min_tokens")
        positive(self, "chunk", "window", "cache_gib")
        if self.cache and "://" in self.cache:
            raise ValueError(
                f"data.cache={self.cache} is a URL, but the cache must be on this "
                "machine: name a local folder"
            )
        for name in ("max_upscale", "slots", "caption_rows", "captions"):
            if getattr(self, name) is not None:
                positive(self, name)
        if self.captions is not None and self.caption_rows is None:
            raise ValueError(
                f"data.captions={self.captions} needs data.caption_rows, which is not "
                "set"
            )
        if self.rows % (self.caption_rows or 1):
            raise ValueError(
                f"data.rows={self.rows} is not divisible by data.caption_rows="
                f"{self.caption_rows}"
            )
        for name in ("workers", "seed", "lanes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.lanes:
            _check_lanes(self)
        if self.square and self.elastic:
            raise ValueError(
                f"data.elastic={self.elastic} gives images other grids than square "
                "ones: set it to 0, or data.square=false"
            )
        if not 0 <= self.elastic < 1:
            raise ValueError(f"elastic must be a share in [0, 1), not {self.elastic}")
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"data.budgets needs positive numbers, not {self.budgets}")
        weights = self.budget_weights
        good = all(0 < weight < math.inf for weight in weights)
        if weights and (len(weights) != len(self.budgets) or not good):
            raise ValueError(
                f"data.budget_weights={weights} needs one positive number for each of "
                f"data.budgets={self.budgets}"
            )
        if self.sides is not None and self.budget_per == "batch":
            raise ValueError('data.sides are drawn per image: budget_per="image"')
        if self.strategy is not None:
            _check_strategy(self)
        elif max(self.budgets) > self.row_tokens and self.sides is None:
            raise ValueError(
                f"data.budgets go up to {max(self.budgets)} tokens, more than a row of "
                f"data.row_tokens={self.row_tokens}: lower one or raise the other"
            )
        if self.min_tokens > min(self.budgets) and self.sides is None:
            raise ValueError(
                f"data.min_tokens={self.min_tokens} is more than the smallest of "
                f"data.budgets={self.budgets}"
            )

    def most_tokens(self, patch_size: int) -> int:
        """The most tokens that an image, or a view of one, may take."""
        if self.strategy is not None:
            return self.row_tokens
        if self.sides is None:
            return max(self.budgets)
        return max(1, int((self.sides.high / patch_size) ** 2))


def _check_lanes(data: DataConfig) -> None:
    """Raises ValueError if lanes cannot share the rows, or plan these draws."""
    own, over = divmod(data.rows, data.lanes)
    if over or own % (data.caption_rows or 1):
        whole = f", in groups of {data.caption_rows}" if data.caption_rows else ""
        raise ValueError(
            f"data.rows={data.rows} cannot be shared evenly by data.lanes={data.lanes}"
            f"{whole}: change one of them"
        )
    if data.budget_per == "batch":
        raise ValueError(
            'data.budget_per="batch" draws one budget for a whole batch, and each of '
            f"data.lanes={data.lanes} is planned by itself: set budget_per to image, "
            "or lanes to 0"
        )
    if data.workers and data.lanes % data.workers:
        raise ValueError(
            f"data.workers={data.workers} cannot share data.lanes={data.lanes} evenly: "
            "change one of them"
        )


def _check_strategy(data: DataConfig) -> None:
    """Raises ValueError for settings that a strategy would have to ignore.

    A field has no "not given", so one that is set to its default goes unnoticed.
    """
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if field.name in _WITHOUT_STRATEGY and value != field.default:
            kind = type(data.strategy).__name__
            raise ValueError(
                f"data.{field.name}={value} is not supported with data.strategy="
                f"{kind}, which decides what each image becomes: leave one of them out"
            )


# Settings of an image's resolution, and of how it is seen; a strategy replaces them.
_WITHOUT_STRATEGY = (
    "budgets",
    "budget_weights",
    "budget_per",
    "sides",
    "min_tokens",
    "square",
    "max_upscale",
    "elastic",
    "crop",
    "flip",
    "drop",
)
