"""Hugging Face directories: `Siglip2Model` (NaFlex), `SiglipModel` (one resolution)."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from navit.config import ModelConfig, PositionConfig, TextConfig, VisionConfig
from navit.convert import tensors, tokenizers
from navit.convert.weights import (
    Tensor,
    Weights,
    layers_of,
    shapes_of,
    to_ours,
    to_theirs,
)
from navit.files import replacing, write_atomic

log = logging.getLogger("navit")

# What a checkpoint may be stored in; all of them are read to float32 exactly.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": None}
# What config.json states and the tensors decide.
_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("patch_size", "num_patches", "image_size"),
    *("vocab_size", "max_position_embeddings"),
}
_SHARD_BYTES = 2 * 2**30
# Only these are understood, so a config.json that states another is refused.
_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
    "num_channels": 3,
}
# What preprocessor_config.json must say, if it says it, as `_preprocessor` does.
_PIXELS = (
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("size", "patch_size"),
)


def is_huggingface(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and _any_tensors(path)


def read(path: Path) -> Weights:
    """Opens a directory; sizes come from the tensors, only heads from config.json.

    Raises:
      ValueError: names the tensor or the setting that is missing, surplus, of another
        shape or type, or not known here.
    """
    where = _locate(path)
    config = _read_json(path / "config.json")
    if config.get("model_type") not in ("siglip", "siglip2"):
        raise ValueError(
            f"{path / 'config.json'} is of a {config.get('model_type')!r}; navit reads "
            "'siglip2' and 'siglip'"
        )
    stored = {name: _shape(file, name) for name, file in where.items()}
    model = _model(path, config, stored)
    _check_preprocessor(path, model)
    table = tensors.huggingface(conv=model.vision.fixed_grid)
    shapes = shapes_of(model)
    _check(path, table, model, shapes, stored)
    by_name: dict[str, Tensor] = {t.ours: t for t in table}

    def get(ours: str) -> np.ndarray:
        t = by_name[ours]
        layers = layers_of(model, ours)
        shape = shapes[ours]
        if layers is None:
            return _part(_load(where, t.theirs), t, shape)
        out = np.empty(shape, np.float32)
        for i in range(layers):
            out[i] = _part(_load(where, t.theirs.format(i)), t, shape[1:])
        return out

    return Weights(model, get, str(path), tokenizers.found_in(path))


def write(weights: Weights, out: Path) -> None:
    """Writes what `Siglip2Model.from_pretrained` opens, and its processor.

    Raises:
      ValueError: names the setting that transformers' class does not have.
    """
    model = weights.model
    _check_expressible(model)
    with replacing(out) as temporary:
        temporary.mkdir()
        _write_tokenizer(weights, temporary)
        _write_json(temporary / "config.json", _config(model))
        _write_json(temporary / "preprocessor_config.json", _preprocessor(model))
        _write_tensors(weights, temporary)


def _write_tensors(weights: Weights, out: Path) -> None:
    table = tensors.huggingface(conv=weights.model.vision.fixed_grid)
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        file = out / f"shard-{len(shards)}"
        try:
            safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from None
        shards.append(list(shard))
        shard, size = {}, 0

    for name, value in _tensors(weights, table, shapes_of(weights.model)):
        if shard and size + value.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = np.ascontiguousarray(value)
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        os.replace(out / f"shard-{i}", out / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _tensors(
    weights: Weights, table: list[Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every stored tensor, one of ours in memory at a time."""
    model = weights.model
    parts: dict[str, dict[int, np.ndarray]] = {}
    for t in table:
        value = weights.read(t.ours)
        if t.part[1] > 1:
            shape = _stored_shape(t, shapes[t.ours])
            one = (shape[0] // t.part[1], *shape[1:])
            parts.setdefault(t.theirs, {})[t.part[0]] = to_theirs(value, t.axes, one)
            continue
        for i, name, shape in _stored(model, t, shapes[t.ours]):
            yield name, to_theirs(value if i is None else value[i], t.axes, shape)
    for name, found in parts.items():
        yield name, np.concatenate([found[i] for i in sorted(found)])


def _stored(
    model: ModelConfig, t: Tensor, shape: tuple[int, ...]
) -> list[tuple[int | None, str, tuple[int, ...]]]:
    """(layer or None, name, shape) of what one of our tensors is stored as."""
    layers = layers_of(model, t.ours)
    if layers is None:
        return [(None, t.theirs, _stored_shape(t, shape))]
    one = _stored_shape(t, shape[1:])
    return [(i, t.theirs.format(i), one) for i in range(layers)]


def _stored_shape(t: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of one of our tensors (of one layer)."""
    if t.axes == "conv":
        side = math.isqrt(shape[0] // 3)
        return (shape[1], 3, side, side)
    stored = {
        "scale": (1,),
        "bias": (1,),
        "vision.head.probe": (1, *shape),
        "vision.position.table": (shape[0] * shape[0], shape[-1]) if shape else (),
    }.get(t.ours, shape[::-1] if t.axes == "transpose" else shape)
    return (stored[0] * t.part[1], *stored[1:])


def _part(value: np.ndarray, t: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    which, many = t.part
    size = len(value) // many
    return to_ours(value[which * size : (which + 1) * size], t.axes, shape)


def _check(
    path: Path,
    table: list[Tensor],
    model: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
) -> None:
    expected = {}
    for t in table:
        for _, name, shape in _stored(model, t, shapes[t.ours]):
            expected[name] = shape
    check_shapes(path, expected, stored)


def check_shapes(
    path: Path,
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
) -> None:
    """Raises ValueError for the first tensor that is missing, surplus or misshapen."""
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{path} lacks the tensor {name}")
        if stored[name] != shape:
            raise ValueError(
                f"{path}: {name} is {stored[name]}, and the other tensors make it "
                f"{shape}"
            )
    # Buffers that transformers once saved; they hold no weights.
    surplus = [n for n in stored if n not in expected and "position_ids" not in n]
    if surplus:
        raise ValueError(
            f"{path} has {len(surplus)} tensors that navit does not know, first "
            f"{surplus[0]}"
        )


def _model(
    path: Path, config: dict[str, Any], stored: dict[str, tuple[int, ...]]
) -> ModelConfig:
    vision, texts = config.get("vision_config", {}), config.get("text_config", {})
    for part in (vision, texts):
        for key, value in _FIXED.items():
            if part.get(key, value) != value:
                raise ValueError(
                    f"{path / 'config.json'}: {key}={part[key]!r} is not supported; "
                    f"SigLIP has {value!r}"
                )

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in stored:
            raise ValueError(f"{path} lacks the tensor {name}")
        if len(stored[name]) != ndim:
            raise ValueError(
                f"{path}: {name} is {stored[name]}, and should have {ndim} axes"
            )
        return stored[name]

    fixed = config["model_type"] == "siglip"
    patch = shape("vision_model.embeddings.patch_embedding.weight", 4 if fixed else 2)
    patch_size = patch[-1] if fixed else math.isqrt(patch[1] // 3)
    positions, width = shape("vision_model.embeddings.position_embedding.weight", 2)
    side = square_side(path, "vision_model.embeddings.position_embedding", positions)
    fc1 = "{}_model.encoder.layers.0.mlp.fc1.weight"
    vocab, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    length, _ = shape("text_model.embeddings.position_embedding.weight", 2)
    image_size = vision.get("image_size") if fixed else None
    if not isinstance(image_size, int) or image_size // patch_size != side:
        image_size = None  # and `_agree` says so, if it is stated
    elif image_size == side * patch_size:
        image_size = None
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch_size,
            width=width,
            depth=_depth(stored, "vision_model.encoder.layers."),
            mlp_dim=shape(fc1.format("vision"), 2)[0],
            num_heads=vision.get("num_attention_heads", 12),
            position=PositionConfig(size=side),
            fixed_grid=fixed,
            image_size=image_size,
        ),
        text=TextConfig(
            tokenizer="",
            vocab_size=vocab,
            length=length,
            width=text_width,
            depth=_depth(stored, "text_model.encoder.layers."),
            mlp_dim=shape(fc1.format("text"), 2)[0],
            num_heads=texts.get("num_attention_heads", 12),
        ),
    )
    _agree(path, config, _config(model))
    return model


def _agree(path: Path, stated: dict[str, Any], found: dict[str, Any]) -> None:
    """A size that config.json states must be the tensors'."""
    for part in ("vision_config", "text_config"):
        for key in _SIZES & found[part].keys():
            value = found[part][key]
            said = stated.get(part, {}).get(key, value)
            if said != value:
                raise ValueError(
                    f"{path}: config.json says {part}.{key}={said!r}, and the tensors "
                    f"make it {value!r}"
                )


def square_side(path: Path, name: str, positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"{path}: {name} has {positions} positions, which is not a square"
        )
    return side


def _depth(stored: dict[str, tuple[int, ...]], prefix: str) -> int:
    numbers = {int(n[len(prefix) :].split(".")[0]) for n in stored if prefix in n}
    return max(numbers, default=0) + 1


def _config(model: ModelConfig) -> dict[str, Any]:
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


def _preprocessor(model: ModelConfig) -> dict[str, Any]:
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


def _check_preprocessor(path: Path, model: ModelConfig) -> None:
    """Pixels must come as navit makes them; how they are resized is only said."""
    want = _preprocessor(model)
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = path / name
        if not file.is_file():
            continue
        said = _read_json(file)
        said = said.get("image_processor", said)
        for key in _PIXELS:
            if key in want and said.get(key) not in (None, want[key]):
                raise ValueError(
                    f"{file} says {key}={said[key]!r}, and navit gives this model "
                    f"images with {want[key]!r}: correct the file, if it is wrong, or "
                    "fold the difference into the patch embedding's weights"
                )
        if said.get("resample") not in (None, want["resample"]):
            log.warning(
                "%s says resample=%s; navit resizes bilinearly (%s), as big_vision did "
                "when it trained the model",
                *(file, said["resample"], want["resample"]),
            )


def _write_tokenizer(weights: Weights, out: Path) -> None:
    for name, data in tokenizers.contents(weights.files).items():
        write_atomic(out / name, data)
    if weights.files:
        assert weights.model.text is not None
        about = tokenizers.config(weights.files, weights.model.text.length)
        write_atomic(out / "tokenizer_config.json", about)


def _check_expressible(model: ModelConfig) -> None:
    v = model.vision
    wrong = {
        "text": model.text is None,
        "vision.position.kind": v.position.kind != "siglip2",
        "vision.pool": v.pool != "map",
        "vision.qk_norm": v.qk_norm,
        "vision.use_bias": not v.use_bias,
        "vision.embed_dim": v.embed_dim is not None,
        "vision.num_classes": v.num_classes > 0,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            value: Any = model
            for part in name.split("."):
                value = getattr(value, part)
            raise ValueError(
                f"model.{name}={value!r} has no place in transformers' Siglip2Model"
            )


def _locate(path: Path) -> dict[str, Path]:
    """Tensor name -> file, of one file or of several with an index."""
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        listed = sorted(set(_read_json(index)["weight_map"].values()))
        for name in listed:
            if Path(name).name != name or not (path / name).is_file():
                raise ValueError(f"{index} names {name!r}, which is not in {path}")
        files = [path / name for name in listed]
    where: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            where |= dict.fromkeys(opened.keys(), file)
    return where


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with _open(file) as opened:
        found = opened.get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{file}: {name} is {found.get_dtype()}, and weights are "
                f"{', '.join(_DTYPES)}"
            )
        return tuple(found.get_shape())


def _load(where: dict[str, Path], name: str) -> np.ndarray:
    with _open(where[name]) as opened:
        return opened.get_tensor(name).astype(np.float32)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def _any_tensors(path: Path) -> bool:
    return any(path.glob("*.safetensors"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object")
    return found


def _write_json(file: Path, data: dict[str, Any]) -> None:
    write_atomic(file, (json.dumps(data, indent=2) + "\n").encode())
