"""Configs that earlier versions saved, as this version writes them."""

from __future__ import annotations

from typing import Any

# Fields of which "" meant "not given", which is None now.
_NOT_GIVEN = {
    "Config": ("init",),
    "TrainConfig": ("profile_steps",),
    "TextConfig": ("tokenizer",),
    "Folder": ("path", "table"),
    "TarShards": ("caption", "classes"),
    "ArrayRecords": ("classes",),
    "Tfds": ("data_dir", "classes"),
    "ParquetImages": ("classes",),
}


def upgraded(data: Any) -> Any:
    """The JSON data of a config, or of a part of one, with this version's fields.

    Earlier versions had one loss, `train.loss`, and `train.loss_implementation`. They
    had a `Stream`, which becomes the source of its files: their model can be used, and
    training says how to go on.
    """
    if isinstance(data, list):
        return [upgraded(item) for item in data]
    if not isinstance(data, dict):
        return data
    data = {key: upgraded(value) for key, value in data.items()}
    if data.get("type") == "Stream":
        return _unstreamed(data)
    fields = _NOT_GIVEN.get(str(data.get("type")), ())
    data |= dict.fromkeys(name for name in fields if data.get(name) == "")
    if data.get("type") == "TrainConfig" and "loss" in data:
        loss = {"type": str(data.pop("loss")).capitalize()}
        implementation = data.pop("loss_implementation", "auto")
        if loss["type"] == "Sigmoid":
            loss["implementation"] = implementation
        data["losses"] = [loss]
    return data


def _unstreamed(data: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = {
        "type": "TarShards",
        "path": data["path"],
        "caption": data["caption"] or None,
        "missing": data["missing"],
    }
    if ".tfrecord" in data["path"]:
        source |= {"type": "TfRecords", "image": data["image"]}
    return source
