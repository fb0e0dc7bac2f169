"""The image towers of Qwen2-VL, 2.5-VL and 3-VL, in whole models or by themselves.

Their patch kernel takes two frames of a video. Both are kept: a still image, which they
see as two equal frames, is multiplied with the sum. Qwen3-VL's deepstack mergers, which
feed the language model from blocks in the middle, are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from navit.config import (
    MergerConfig,
    ModelConfig,
    PositionConfig,
    RotaryConfig,
    VisionConfig,
)
from navit.convert.codec import Table, Tensor
from navit.convert.huggingface_config import member
from navit.convert.stored import depth_of, shape_of, square_side
from navit.convert.tensors import joined, torch_layer, torch_patch
from navit.convert.tower import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Files,
    Json,
    Shapes,
    Tower,
    choice,
    colours,
    number,
    prefix_of,
    present,
)
from navit.plan.strategies import QwenVL, Strategy

NAME = "Qwen-VL"
_DEEPSTACK = "deepstack_merger_list."
_ACTS = {
    "quick_gelu": "quick",
    "silu": "silu",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "exact",
}


def find(names: Collection[str]) -> str | None:
    for mlp in ("fc1", "gate_proj", "linear_fc1"):  # Qwen2-VL's, 2.5's, 3's
        first = f"blocks.0.mlp.{mlp}.weight"
        prefix = prefix_of(names, first, "blocks.0.attn.qkv.weight")
        if prefix is not None and any(
            name.startswith(f"{prefix}merger.") for name in names
        ):
            return prefix
    return None


def owned(names: Collection[str], prefix: str) -> list[str]:
    own = [name for name in names if name.startswith(prefix)]
    return [name for name in own if not name.startswith(prefix + _DEEPSTACK)]


def is_like(model: ModelConfig) -> bool:
    v = model.vision
    return v.rotary is not None and v.rotary.kind == "qwen" and v.patch_frames == 2


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, file = json["config.json"], path / "config.json"
    vision = member(file, config, "vision_config", dict, "an object", config)

    def shape(name: str, *axes: int) -> tuple[int, ...]:
        return shape_of(path, stored, f"{prefix}{name}", *axes)

    width, _, frames, patch, _ = shape("patch_embed.proj.weight", 5)
    gated = f"{prefix}blocks.0.mlp.gate_proj.weight" in stored
    third = f"{prefix}blocks.0.mlp.linear_fc1.weight" in stored  # Qwen3-VL
    first = "gate_proj" if gated else "linear_fc1" if third else "fc1"
    mlp_dim, _ = shape(f"blocks.0.mlp.{first}.weight", 2)
    out_dim, _ = shape(f"merger.{'linear_fc2' if third else 'mlp.2'}.weight", 2)
    merge = number(path, vision, "spatial_merge_size", 2)
    depth = depth_of(stored, rf"{prefix}blocks\.(\d+)\.")
    options: dict[str, Any] = {"norm": "rms" if gated else "layer"}
    if gated:
        window = number(path, vision, "window_size", 112)
        full = vision.get("fullatt_block_indexes", [7, 15, 23, 31])
        if not isinstance(full, list):
            raise ValueError(
                f"{file}: fullatt_block_indexes is {full!r}, but should be a list"
            )
        # Windows are of whole merged tokens.
        options["window"] = window // merge // patch * merge
        options |= {"full_blocks": tuple(full), "gated": True}
    position, act = PositionConfig(kind="none"), "silu" if gated else "quick_gelu"
    release = (CLIP_MEAN, CLIP_STD)
    if third:
        positions, _ = shape("pos_embed.weight", 2)
        side = square_side(path, f"{prefix}pos_embed.weight", positions)
        position = PositionConfig(size=side, resize="linear-align-corners")
        act, release = "gelu_pytorch_tanh", (HALF, HALF)
    mean, std = colours(path, json, *release)
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch,
            patch_frames=frames,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=number(path, vision, "num_heads", 16),
            position=position,
            rotary=RotaryConfig("qwen"),
            act=choice(path, vision, "hidden_act", _ACTS, act),
            patch_bias=third,
            final_norm=False,
            pool="mean",
            mean=mean,
            std=std,
            **options,
        ),
        text=None,
        merger=MergerConfig(out_dim=out_dim, side=merge, norm=options["norm"]),
    )
    strategy = _strategy(path, json, patch, merge)
    return Tower(model, _table(model, prefix), strategy)


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    if model.merger is None:
        raise ValueError(
            f"{NAME}'s layout has a merger, and this model has none: write the format "
            "navit (--format navit)"
        )
    if v.position.kind != "none":
        raise ValueError(
            "Qwen3-VL's layout has deepstack mergers, which navit leaves out: write "
            "the format navit (--format navit)"
        )
    side = model.merger.side
    vision: dict[str, Any] = {
        "depth": v.depth,
        "num_heads": v.num_heads,
        "hidden_act": next(name for name, act in _ACTS.items() if act == v.act),
        "in_channels": 3,
        "patch_size": v.patch_size,
        "spatial_merge_size": side,
        "temporal_patch_size": v.patch_frames,
    }
    if v.gated:
        kind = "qwen2_5_vl"
        vision |= {
            "hidden_size": v.width,
            "intermediate_size": v.mlp_dim,
            "out_hidden_size": model.merger.out_dim,
            "window_size": v.window * v.patch_size,
            "fullatt_block_indexes": list(v.full_blocks),
        }
    else:
        kind = "qwen2_vl"
        vision |= {
            "embed_dim": v.width,
            "hidden_size": model.merger.out_dim,
            "mlp_ratio": v.mlp_dim // v.width,
        }
    if not isinstance(strategy, QwenVL):
        strategy = QwenVL(v.patch_size, side)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": v.patch_size,
        "temporal_patch_size": v.patch_frames,
        "merge_size": side,
        "min_pixels": strategy.min_pixels,
        "max_pixels": strategy.max_pixels,
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }
    config: dict[str, Any] = {"model_type": kind, "vision_config": vision}
    json = {"config.json": config, "preprocessor_config.json": preprocessor}
    return Files(json, _table(model, "visual."), "visual.")


def _strategy(path: Path, json: Json, patch: int, merge: int) -> QwenVL:
    """The processor's bounds of an image's area, under their older or newer names."""
    data = json.get("preprocessor_config.json", {})
    file = path / "preprocessor_config.json"
    size = member(file, {"size": data.get("size") or {}}, "size", dict, "an object")
    bounds = {}
    for key, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = data.get(key)
        value = size.get(newer) if value is None else value
        if value is not None:
            bounds[key] = value
    try:
        return QwenVL(patch, merge, **bounds)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _table(model: ModelConfig, prefix: str) -> Table:
    blocks, theirs = "vision.encoder.blocks", f"{prefix}blocks.{{}}"
    kernels, biases = joined(f"{blocks}.attention")
    mlp, merger = {"up": "fc1", "down": "fc2"}, ("ln_q", "mlp.0", "mlp.2")
    if model.vision.position.kind == "siglip2":  # Qwen3-VL
        mlp = {"up": "linear_fc1", "down": "linear_fc2"}
        merger = ("norm", "linear_fc1", "linear_fc2")
    if model.vision.gated:
        mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    table = [
        *torch_patch(f"{prefix}patch_embed.proj", frames=True),
        Tensor(
            f"{prefix}pos_embed.weight", ("vision.position.table",), "y x d -> (y x) d"
        ),
        *torch_layer(f"{blocks}.attention_norm", f"{theirs}.norm1"),
        Tensor(f"{theirs}.attn.qkv.weight", kernels, "i o -> o i"),
        Tensor(f"{theirs}.attn.qkv.bias", biases),
        *torch_layer(f"{blocks}.attention.out", f"{theirs}.attn.proj"),
        *torch_layer(f"{blocks}.mlp_norm", f"{theirs}.norm2"),
        *torch_layer("merger.norm", f"{prefix}merger.{merger[0]}"),
        *torch_layer("merger.up", f"{prefix}merger.{merger[1]}"),
        *torch_layer("merger.down", f"{prefix}merger.{merger[2]}"),
    ]
    for ours, name in mlp.items():
        table += torch_layer(f"{blocks}.mlp.{ours}", f"{theirs}.mlp.{name}")
    return present(table, model)
