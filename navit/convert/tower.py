"""What the families of image towers share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from navit.config import ModelConfig, VisionConfig
from navit.convert.codec import Table
from navit.convert.settings import Settings
from navit.convert.stored import shapes_of
from navit.plan.strategies import Strategy

# Mean and standard deviation of pixels from 0 to 1.
SIGLIP_COLOURS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_COLOURS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_THETA = 10000.0
_FILTERS: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}

Act = Literal["tanh", "exact", "quick", "silu"]
Colours = tuple[tuple[float, ...], tuple[float, ...]]
Shapes = Mapping[str, tuple[int, ...]]


class Json(NamedTuple):
    """What a directory says beside its tensors.

    Attributes:
      config: config.json.
      processor: the image processor's file; empty if there is none.
    """

    config: Settings
    processor: Settings


class Owned(NamedTuple):
    """The tensors of a tower.

    Attributes:
      names: their stored names.
      left_out: which part of the tower's way to the language model they lack, in words
        for the log; None if they have all.
    """

    names: list[str]
    left_out: str | None = None


class Tower(NamedTuple):
    """A tower as it was found.

    Attributes:
      strategy: how images become patches for it; None is navit's own rule.
    """

    model: ModelConfig
    table: Table
    strategy: Strategy | None


class Files(NamedTuple):
    """What to write beside the tensors, and how their names begin."""

    json: dict[str, dict[str, Any]]
    table: Table
    prefix: str


def present(table: Table, model: ModelConfig) -> Table:
    """The entries whose parameters the model has: norms and layers may lack a bias."""
    ours = shapes_of(model)
    return [tensor for tensor in table if ours.keys() >= set(tensor.ours)]


def begins_any(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def theta(config: Settings) -> float | None:
    """The base of the rotary frequencies, if it is not the usual one."""
    inner = config.part("rope_parameters", optional=True)
    inner.choice("rope_type", {"axial": True, "default": True}, "axial")
    usual = config.positive("rope_theta", _THETA)
    value = inner.positive("rope_theta", usual)
    return None if value == _THETA else value


def stated_theta(vision: VisionConfig) -> dict[str, float]:
    """The setting that `theta` reads; empty if it is the usual one."""
    if vision.rotary is None or vision.rotary.theta is None:
        return {}
    return {"rope_theta": vision.rotary.theta}


def filter_of(
    processor: Settings, default: Literal["bilinear", "bicubic"]
) -> Literal["bilinear", "bicubic"]:
    """The filter with which images are resized; files name it by PIL's number."""
    (number,) = (number for number, name in _FILTERS.items() if name == default)
    return processor.choice("resample", _FILTERS, number)


def filter_number(name: str) -> int:
    return next(number for number, each in _FILTERS.items() if each == name)


def check_pixels(processor: Settings, **sizes: int) -> None:
    """Refuses pixels that are made in another way than navit makes them.

    Args:
      sizes: those that the processor may state, as the tower has them.
    """
    processor.expect(
        do_resize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        do_center_crop=False,
    )
    processor.agree(**sizes)


def colours(processor: Settings, release: Colours) -> dict[str, Any]:
    """`mean` and `std` of pixels from 0 to 1, as the processor has them.

    Args:
      release: those of the release, if the directory has no processor.
    """
    return {
        "mean": processor.colours("image_mean", release[0], zero=True),
        "std": processor.colours("image_std", release[1], zero=False),
    }


def ratio_of(mlp_dim: int, width: int) -> int | float:
    """The least number that gives `mlp_dim` if it is multiplied and rounded down."""
    ratio = mlp_dim / width
    while int(width * ratio) < mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return int(ratio) if ratio.is_integer() else ratio


def act_name(vision: VisionConfig, names: Mapping[str, Act], layout: str) -> str:
    """What a layout calls the tower's activation."""
    for name, act in names.items():
        if act == vision.act:
            return name
    raise ValueError(
        f"{layout}'s layout does not support model.vision.act={vision.act!r}: write "
        "the format navit (--format navit), which has every setting"
    )
