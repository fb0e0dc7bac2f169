"""Image towers of language models and of timm, told apart by their tensors' names.

Only the tower's tensors are read, so a directory of any size takes the tower's memory.
A family is a module with `NAME`; to read, `MARKERS`, `owned` and `tower`; and to write,
`NEEDS` and `written`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from navit.config import ROUNDING, ModelConfig, differences
from navit.convert import (
    codec,
    moonvit,
    ovis_vision,
    pixtral,
    qwen_vision,
    shards,
    timm_naflexvit,
)
from navit.convert.huggingface_config import member, read_json, write_json
from navit.convert.settings import Settings
from navit.convert.stored import Weights, check_expressible, shapes_of
from navit.convert.tower import Json
from navit.files import replacing
from navit.plan.strategies import Strategy

log = logging.getLogger("navit")

# By `VisionConfig.family`, which is also the format to write.
FAMILIES: dict[str, ModuleType] = {
    "moonvit": moonvit,
    "qwen_vl": qwen_vision,
    "ovis": ovis_vision,
    "pixtral": pixtral,
    "timm": timm_naflexvit,
}
_REMEDY = "write the format navit (--format navit), which has every setting"


class Found(NamedTuple):
    """A tower in a directory.

    Attributes:
      family: its name in `FAMILIES`.
      prefix: how its tensors' names begin.
      missing: the names of those that would show which tower it is, but are not there.
    """

    family: str
    prefix: str
    missing: list[str]


def find(path: Path, family: str | None = None) -> Found | None:
    """The tower in a Hugging Face directory; None if it has the tensors of none.

    Args:
      family: in `FAMILIES`, chooses one of several towers.

    Raises:
      ValueError: if there are several, none of the chosen family, or if some tensors
        of one are missing.
    """
    names = shards.listed(path)
    found = [each for name in FAMILIES for each in _candidates(names, name)]
    whole = [each for each in found if not each.missing]
    whole = [each for each in whole if each.family == family] or whole
    if len(whole) > 1:
        listed = ", ".join(f"{x.family} ({x.prefix or 'no prefix'})" for x in whole)
        raise ValueError(
            f"{path} has {len(whole)} image towers: {listed}: choose one by its family "
            f"with model.vision.family={whole[0].family}, or leave the tensors of the "
            "others out of model.safetensors.index.json"
        )
    if whole and family in FAMILIES and family != whole[0].family:
        raise ValueError(
            f"{path} has no tower of model.vision.family={family}: its tower is "
            f"{whole[0].family}"
        )
    if whole:
        return whole[0]
    if not found:
        return None
    best = min(found, key=lambda each: len(each.missing))
    raise ValueError(
        f"{path} has a part of the tower of {FAMILIES[best.family].NAME}, but lacks "
        f"the {_tensors(best.missing)}: get its files again"
    )


def read(path: Path, found: Found) -> Weights:
    """Opens a directory with such a tower.

    Sizes come from its tensors; only what they do not show, from its JSON files.

    Raises:
      ValueError: names a tensor or setting that is missing, surplus, not supported, or
        of another shape or type.
    """
    family, listed = FAMILIES[found.family], shards.listed(path)
    names, left_out = family.owned(listed, found.prefix)
    if left_out:
        log.warning("%s: navit leaves out %s", path, left_out)
    own = {name: listed[name] for name in names}
    stored = shards.shapes(path, own)
    tower = family.tower(path, _json(path), stored, found.prefix)
    expected = codec.stored_shapes(tower.table, tower.model)
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(
            f"{path}: its {family.NAME} tower lacks the {_tensors(missing)}: get its "
            "files again"
        )
    codec.check(path, tower.table, tower.model, stored)
    get = codec.reader(
        tower.table, tower.model, lambda name: shards.load(own[name], name)
    )
    return Weights(tower.model, get, str(path), strategy=tower.strategy)


def layout_of(model: ModelConfig) -> str:
    """The Hugging Face layout of a model: SigLIP's, or that of its tower's family.

    SigLIP's is preferred for timm's SigLIP towers with a text tower, as it has both.
    """
    family = model.vision.family
    if family is None:
        return "huggingface"
    if family == "timm" and model.text is not None:
        try:
            check_expressible(model, "SigLIP")
        except ValueError:
            return family
        return "huggingface"
    return family


def write(weights: Weights, out: Path, name: str) -> None:
    """Writes the image tower, with its merger, in the layout of a family.

    Args:
      name: the family's, in `FAMILIES`.

    Raises:
      ValueError: names a setting of the model, or of its strategy, that the layout
        lacks.
    """
    family = FAMILIES[name]
    has_text = weights.model.text is not None
    model = dataclasses.replace(weights.model, text=None)
    weights = dataclasses.replace(weights, model=model)
    _check_needs(model, family)
    files = family.written(model, weights.strategy)
    shapes = codec.stored_shapes(files.table, model)
    kept = {ours for tensor in files.table for ours in tensor.ours}
    if lost := [ours for ours in shapes_of(model) if ours not in kept]:
        raise ValueError(
            f"{family.NAME}'s layout has no place for model.{lost[0]}: {_REMEDY}"
        )
    json = {x: Settings(out / x, data) for x, data in files.json.items()}
    nothing = Settings(out / "preprocessor_config.json", {})
    both = Json(json["config.json"], json.get("preprocessor_config.json", nothing))
    back = family.tower(out, both, shapes, files.prefix)
    _check_same(model, back.model, family.NAME)
    _check_strategy(weights.strategy, back.strategy, family.NAME)
    if has_text:
        log.warning(
            "%s: the text tower is left out, as %s's layout has none", out, family.NAME
        )
    with replacing(out, folder=True) as temporary:
        temporary.mkdir()
        for file, data in files.json.items():
            write_json(temporary / file, data)
        shards.write(temporary, shapes, codec.encoded(files.table, weights))


def _candidates(names: Collection[str], family: str) -> list[Found]:
    """Where most of a family's tensors are, by their names."""
    module = FAMILIES[family]
    ends = tuple(end for ends in module.MARKERS for end in ends)
    prefixes = {
        prefix
        for name in names
        for end in ends
        if name.endswith(end)
        and ((prefix := name.removesuffix(end)) == "" or prefix.endswith("."))
    }
    found = []
    for prefix in sorted(prefixes):
        missing = [
            prefix + ends[0]
            for ends in module.MARKERS
            if not any(prefix + end in names for end in ends)
        ]
        if module is qwen_vision and qwen_vision.lacks_merger(names, prefix):
            missing = [x for x in missing if not x.startswith(f"{prefix}merger.")]
        if 2 * len(missing) < len(module.MARKERS):
            found.append(Found(family, prefix, missing))
    return found


def _tensors(names: list[str]) -> str:
    """`"tensor a"`, or `"3 tensors a, b, c"`."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors {', '.join(names[:3])}{more}"


def _json(path: Path) -> Json:
    """config.json, and what the image processor's file says, without its nulls."""
    file, data = path / "preprocessor_config.json", {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            file, data = path / name, read_json(path / name)
            data = member(file, data, "image_processor", dict, "an object", data)
    stated = {key: value for key, value in data.items() if value is not None}
    config = path / "config.json"
    return Json(Settings(config, read_json(config)), Settings(file, stated))


def _check_needs(model: ModelConfig, family: ModuleType) -> None:
    """Raises ValueError for the first setting that every tower of a family has."""
    for name, want in family.NEEDS.items():
        value: Any = model.vision
        for part in name.split("."):
            value = getattr(value, part, None)
        if value != want:
            raise ValueError(
                f"{family.NAME}'s layout does not support model.vision.{name}="
                f"{value!r}, as its towers have {want!r}: {_REMEDY}"
            )


def _check_same(model: ModelConfig, back: ModelConfig, format: str) -> None:
    """Raises ValueError for a setting that a reader would find otherwise."""
    for difference in differences(model, back, "model"):
        free = (*ROUNDING, "model.init_", "model.vision.family")
        if not difference.startswith(free):
            raise _not_supported(difference, format)


def _check_strategy(
    strategy: Strategy | None, back: Strategy | None, format: str
) -> None:
    """Raises ValueError for a strategy that a reader would find otherwise."""
    if strategy is None:
        if back is not None:
            log.info("the model has no data.strategy: writing %r", back)
    elif type(strategy) is not type(back):
        own = f"data.strategy={back.short}" if back else "data.strategy=none"
        raise ValueError(
            f"{format}'s layout does not support data.strategy={strategy.short}: set "
            f"{own}, or {_REMEDY}"
        )
    else:
        for difference in differences(strategy, back, "data.strategy"):
            raise _not_supported(difference, format)


def _not_supported(difference: str, format: str) -> ValueError:
    setting = difference.partition(" -> ")[0].replace(": ", "=")
    return ValueError(f"{format}'s layout does not support {setting}: {_REMEDY}")
