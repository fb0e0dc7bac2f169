"""What the families of image towers share: their parts, and how settings are read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from navit.config import ModelConfig
from navit.convert.codec import Table
from navit.convert.huggingface_config import member
from navit.convert.stored import shapes_of
from navit.plan.strategies import Strategy

log = logging.getLogger("navit")

# The mean and standard deviation of pixels from 0 to 1: SigLIP's, and CLIP's.
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Json = Mapping[str, dict[str, Any]]  # file name -> its content
Shapes = Mapping[str, tuple[int, ...]]


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


def prefix_of(names: Collection[str], *ends: str) -> str | None:
    """What comes before all of `ends` in some of the names; None if nothing does."""
    for name in names:
        if name.endswith(ends[0]):
            prefix = name.removesuffix(ends[0])
            if all(prefix + end in names for end in ends):
                return prefix
    return None


def projector_of(prefix: str) -> str | None:
    """How the names of the projector begin, if a tower is part of a language model."""
    if not prefix.endswith("vision_tower."):
        return None
    return prefix.removesuffix("vision_tower.") + "multi_modal_projector."


def present(table: Table, model: ModelConfig) -> Table:
    """The entries whose parameters the model has: norms and layers may lack a bias."""
    ours = shapes_of(model)
    return [tensor for tensor in table if ours.keys() >= set(tensor.ours)]


def number(path: Path, data: dict[str, Any], key: str, default: int) -> int:
    """A whole number above 0 in config.json, which may leave out the class's default.

    Raises:
      ValueError: if it is something else.
    """
    file = path / "config.json"
    if key not in data:
        log.info("%s does not state %s: assuming %d", file, key, default)
    value = member(file, data, key, int, "a number of at least 1", default)
    if isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{file}: {key} is {value!r}, but should be a number of at least 1"
        )
    return value


def choice(
    path: Path, data: dict[str, Any], key: str, known: Mapping[Any, Any], default: Any
) -> Any:
    """What a setting of config.json stands for, of those that navit knows."""
    value = data.get(key, default)
    if value not in known:
        raise ValueError(
            f"{path / 'config.json'}: {key}={value!r} is not supported; navit knows "
            f"{', '.join(map(repr, known))}"
        )
    return known[value]


def colours(
    path: Path, json: Json, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of pixels from 0 to 1, as the processor has it.

    Args:
      mean, std: those of the release, if the directory has no processor.
    """
    data = json.get("preprocessor_config.json", {})
    found = []
    for key, default in (("image_mean", mean), ("image_std", std)):
        value = data.get(key, default)
        try:
            three = tuple(float(x) for x in value)
        except (TypeError, ValueError):
            three = ()
        if len(three) != 3:
            raise ValueError(
                f"{path / 'preprocessor_config.json'}: {key} is {value!r}, but should "
                "be three numbers"
            )
        found.append(three)
    return found[0], found[1]
