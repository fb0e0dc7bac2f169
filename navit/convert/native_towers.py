"""Image towers of language models and of timm, told apart by their tensors' names.

Only the tower's tensors are read, so a directory of any size takes the tower's memory.
A family is a module with `find`, `owned` and `tower` to read, and `is_like` and
`written` to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

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
from navit.convert.stored import Weights
from navit.files import replacing

_FAMILIES: tuple[ModuleType, ...] = (
    moonvit,
    qwen_vision,
    ovis_vision,
    pixtral,
    timm_naflexvit,
)


def holds_tower(path: Path) -> bool:
    """Whether a Hugging Face directory has the tensors of one of these towers."""
    return _find(shards.listed(path)) is not None


def read(path: Path) -> Weights:
    """Opens a directory with such a tower.

    Sizes come from its tensors; only what they do not show, from its JSON files.

    Raises:
      ValueError: names a tensor or setting that is missing, surplus, not supported, or
        of another shape or type.
    """
    listed = shards.listed(path)
    found = _find(listed)
    assert found is not None
    family, prefix = found
    own = {name: listed[name] for name in family.owned(listed, prefix)}
    stored = shards.shapes(path, own)
    tower = family.tower(path, _json(path), stored, prefix)
    codec.check(path, tower.table, tower.model, stored)
    get = codec.reader(
        tower.table, tower.model, lambda name: shards.load(own[name], name)
    )
    return Weights(tower.model, get, str(path), strategy=tower.strategy)


def family_of(model: ModelConfig) -> ModuleType | None:
    """The family that a model's settings belong to; None if it is SigLIP's."""
    return next((family for family in _FAMILIES if family.is_like(model)), None)


def write(weights: Weights, out: Path, family: ModuleType) -> None:
    """Writes a directory in the layout of one of these families.

    Raises:
      ValueError: names a setting that the layout lacks.
    """
    model = weights.model
    files = family.written(model, weights.strategy)
    shapes = codec.stored_shapes(files.table, model)
    back = family.tower(out, files.json, shapes, files.prefix)
    _check_same(model, back.model, family.NAME)
    with replacing(out, folder=True) as temporary:
        temporary.mkdir()
        for name, data in files.json.items():
            write_json(temporary / name, data)
        shards.write(temporary, shapes, codec.encoded(files.table, weights))


def _find(names: Collection[str]) -> tuple[ModuleType, str] | None:
    for family in _FAMILIES:
        prefix = family.find(names)
        if prefix is not None:
            return family, prefix
    return None


def _json(path: Path) -> dict[str, dict[str, Any]]:
    """config.json, and what the image processor's file says."""
    json = {"config.json": read_json(path / "config.json")}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            data = read_json(path / name)
            data = member(path / name, data, "image_processor", dict, "an object", data)
            json["preprocessor_config.json"] = data
    return json


def _check_same(model: ModelConfig, back: ModelConfig, format: str) -> None:
    """Raises ValueError for a setting that a reader would find otherwise."""
    text = dataclasses.replace(model, text=None)
    for difference in differences(text, back, "model"):
        if not difference.startswith((*ROUNDING, "model.init_")):
            setting = difference.partition(" -> ")[0].replace(": ", "=")
            raise ValueError(
                f"{format}'s layout does not support {setting}: write the format navit "
                "(--format navit), which has every setting"
            )
    if model.text is not None:
        raise ValueError(
            f"{format}'s layout has no text tower, and this model has one: write the "
            "format navit (--format navit), which has both"
        )
