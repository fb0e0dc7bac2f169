"""The JSON files of a Hugging Face directory: config and preprocessor."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from navit.config import ModelConfig, PositionConfig, TextConfig, VisionConfig
from navit.convert.stored import depth_of, shape_of, square_side
from navit.files import write_atomic

log = logging.getLogger("navit")

# Sizes in config.json, which must agree with the tensors.
_SIZES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "num_patches",
    "image_size",
    "vocab_size",
    "max_position_embeddings",
}
# Settings with only one supported value; a config.json with another is refused.
_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
    "num_channels": 3,
}
# Settings that, if preprocessor_config.json has them, must equal `preprocessor_of`'s.
_PIXELS = (
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "size",
    "patch_size",
)


def model_of(
    path: Path, config: dict[str, Any], stored: dict[str, tuple[int, ...]]
) -> ModelConfig:
    """A model's config: sizes from its tensors' shapes, only heads from config.json.

    Raises:
      ValueError: names a setting of config.json that contradicts the tensors or is not
        supported.
    """
    file = path / "config.json"
    vision, texts = (
        member(file, config, f"{x}_config", dict, "an object", {})
        for x in ("vision", "text")
    )
    for part in (vision, texts):
        for key, value in _FIXED.items():
            if part.get(key, value) != value:
                raise ValueError(
                    f"{file}: {key}={part[key]!r} is not supported; "
                    f"SigLIP has {value!r}"
                )

    shape = functools.partial(shape_of, path, stored)

    def tower(name: str, part: dict[str, Any]) -> dict[str, Any]:
        layers = f"{name}_model.encoder.layers"
        mlp_dim, width = shape(f"{layers}.0.mlp.fc1.weight", 2)
        depth = depth_of(stored, rf"{re.escape(layers)}\.(\d+)\.")
        heads = _heads(file, part, f"{name}_config")
        return dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads)

    fixed = config["model_type"] == "siglip"
    patch = shape("vision_model.embeddings.patch_embedding.weight", 4 if fixed else 2)
    patch_size = patch[-1] if fixed else math.isqrt(patch[1] // 3)
    positions, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    side = square_side(path, "vision_model.embeddings.position_embedding", positions)
    vocab, _ = shape("text_model.embeddings.token_embedding.weight", 2)
    length, _ = shape("text_model.embeddings.position_embedding.weight", 2)
    image_size = vision.get("image_size") if fixed else None
    if not isinstance(image_size, int) or image_size // patch_size != side:
        image_size = None  # `_agree` refuses it if config.json states it
    elif image_size == side * patch_size:
        image_size = None
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch_size,
            position=PositionConfig(size=side),
            fixed_grid=fixed,
            image_size=image_size,
            **tower("vision", vision),
        ),
        text=TextConfig(
            tokenizer=None,
            vocab_size=vocab,
            length=length,
            **tower("text", texts),
        ),
    )
    _agree(path, config, config_of(model))
    return model


def _agree(path: Path, stated: dict[str, Any], actual: dict[str, Any]) -> None:
    """Checks that the sizes in config.json are those of the tensors."""
    for part in ("vision_config", "text_config"):
        for key in _SIZES & actual[part].keys():
            value = actual[part][key]
            stated_value = stated.get(part, {}).get(key, value)
            if stated_value != value:
                raise ValueError(
                    f"{path}: config.json has {part}.{key}={stated_value!r}, but the "
                    f"tensors make it {value!r}"
                )


def _heads(file: Path, part: dict[str, Any], name: str) -> int:
    key = "num_attention_heads"
    if key not in part:  # transformers omits its default
        log.info("%s does not state %s.%s: assuming 12", file, name, key)
    heads = member(file, part, key, int, "a number of at least 1", 12)
    if isinstance(heads, bool) or heads < 1:
        raise ValueError(
            f"{file}: {key} is {heads!r}, but should be a number of at least 1"
        )
    return heads


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json, as transformers itself writes it."""
    v, t = model.vision, model.text
    assert t is not None
    shared = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    shared |= {"attention_dropout": 0.0}
    kind = "siglip" if v.fixed_grid else "siglip2"
    side = v.position.size
    image_size = v.image_size or side * v.patch_size
    vision = {
        "model_type": f"{kind}_vision_model",
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "patch_size": v.patch_size,
        "num_channels": 3,
        **({"image_size": image_size} if v.fixed_grid else {}),
        **({} if v.fixed_grid else {"num_patches": side * side}),
    }
    text = {
        "model_type": f"{kind}_text_model",
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.length,
        "hidden_size": t.width,
        "intermediate_size": t.mlp_dim,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.num_heads,
        "projection_size": v.width,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    return {
        "architectures": ["SiglipModel" if v.fixed_grid else "Siglip2Model"],
        "model_type": kind,
        "initializer_factor": 1.0,
        "dtype": "float32",
        "text_config": shared | text,
        "vision_config": shared | vision,
    }


def preprocessor_of(model: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json, for the pixels that navit gives the model."""
    v = model.vision
    kind = "Siglip" if v.fixed_grid else "Siglip2"
    side = v.image_size or v.position.size * v.patch_size
    sizes: dict[str, Any] = (
        {"size": {"height": side, "width": side}}
        if v.fixed_grid
        else {"patch_size": v.patch_size, "max_num_patches": 256}
    )
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_resize": True,
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        **sizes,
    }


def check_preprocessor(path: Path, model: ModelConfig) -> None:
    """Refuses preprocessing other than navit's; only warns about the resize filter."""
    want = preprocessor_of(model)
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = path / name
        if not file.is_file():
            continue
        stated = read_json(file)
        stated = member(file, stated, "image_processor", dict, "an object", stated)
        for key in _PIXELS:
            if key in want and stated.get(key) not in (None, want[key]):
                raise ValueError(
                    f"{file} has {key}={stated[key]!r}, but navit gives this model "
                    f"images with {want[key]!r}: correct the file if it is wrong, or "
                    "fold the difference into the patch embedding's weights"
                )
        if stated.get("resample") not in (None, want["resample"]):
            log.warning(
                "%s has resample=%s, but navit resizes bilinearly (%s), as big_vision "
                "did when it trained the model",
                file,
                stated["resample"],
                want["resample"],
            )


def member(
    file: Path, data: dict[str, Any], key: str, kind: type, what: str, *default: Any
) -> Any:
    """Returns `data[key]`, or the default if there is one.

    Raises:
      ValueError: if it is missing and has no default, or has another type.
    """
    if key not in data and not default:
        raise ValueError(f"{file} lacks {key}, which should be {what}")
    value = data.get(key, *default)
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {key} is {value!r}, but should be {what}")
    return value


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} is not a JSON object")
    return data


def write_json(file: Path, data: dict[str, Any]) -> None:
    write_atomic(file, (json.dumps(data, indent=2) + "\n").encode())
