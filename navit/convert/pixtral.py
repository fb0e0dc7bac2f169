"""Pixtral's image tower in transformers' layout, in whole models or by itself.

transformers stores the pairs of rotary channels as navit does; Mistral's own files,
which have other names, do not. Of Mistral Small 3.1, whose projector merges patches in
another way, the tower is read without it.
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
from navit.convert.codec import Table
from navit.convert.huggingface_config import member
from navit.convert.stored import depth_of, shape_of
from navit.convert.tensors import QKV, torch_layer, torch_patch
from navit.convert.tower import (
    CLIP_MEAN,
    CLIP_STD,
    Files,
    Json,
    Shapes,
    Tower,
    colours,
    number,
    prefix_of,
    present,
    projector_of,
)
from navit.plan.strategies import Pixtral, Strategy

NAME = "Pixtral"
_TOWER = "vision_tower."


def find(names: Collection[str]) -> str | None:
    first = "transformer.layers.0.attention.q_proj.weight"
    return prefix_of(names, "patch_conv.weight", first)


def owned(names: Collection[str], prefix: str) -> list[str]:
    projector = projector_of(prefix)
    merges = any(projector and x.startswith(f"{projector}patch_merger") for x in names)
    begins = (prefix,) if merges or not projector else (prefix, projector)
    return [name for name in names if name.startswith(begins)]


def is_like(model: ModelConfig) -> bool:
    rotary = model.vision.rotary
    return rotary is not None and rotary.kind == "pixtral"


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config = json["config.json"]
    vision = member(
        path / "config.json", config, "vision_config", dict, "an object", config
    )
    width, _, patch, _ = shape_of(path, stored, f"{prefix}patch_conv.weight", 4)
    layers = f"{prefix}transformer.layers"
    mlp_dim, _ = shape_of(path, stored, f"{layers}.0.feed_forward.gate_proj.weight", 2)
    merger, projector = None, projector_of(prefix)
    if projector and f"{projector}linear_1.weight" in stored:
        out_dim, hidden = shape_of(path, stored, f"{projector}linear_2.weight", 2)
        merger = MergerConfig(out_dim=out_dim, side=1, norm="none", hidden_dim=hidden)
    mean, std = colours(path, json, CLIP_MEAN, CLIP_STD)
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch,
            width=width,
            depth=depth_of(stored, rf"{layers}\.(\d+)\."),
            mlp_dim=mlp_dim,
            num_heads=number(path, vision, "num_attention_heads", 16),
            position=PositionConfig(kind="none"),
            rotary=RotaryConfig("pixtral"),
            norm="rms",
            eps=1e-5,
            act="silu",  # the first releases' configs say "gelu", and were corrected
            gated=True,
            use_bias=False,
            pre_norm=True,
            final_norm=False,
            pool="mean",
            mean=mean,
            std=std,
        ),
        text=None,
        merger=merger,
    )
    file = path / "preprocessor_config.json"
    size = json.get("preprocessor_config.json", {}).get("size") or {}
    size = member(file, {"size": size}, "size", dict, "an object")
    side = size.get("longest_edge") or number(path, vision, "image_size", 1024)
    return Tower(model, _table(model, prefix), Pixtral(patch, side))


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    side = strategy.side if isinstance(strategy, Pixtral) else 1024
    vision = {
        "model_type": "pixtral",
        "patch_size": v.patch_size,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "hidden_act": "silu",
        "image_size": side,
    }
    config: dict[str, Any] = {"model_type": "llava", "vision_config": vision}
    preprocessor = {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": v.patch_size, "width": v.patch_size},
        "size": {"longest_edge": side},
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }
    json = {"config.json": config, "preprocessor_config.json": preprocessor}
    return Files(json, _table(model, _TOWER), _TOWER)


def _table(model: ModelConfig, prefix: str) -> Table:
    blocks, theirs = "vision.encoder.blocks", f"{prefix}transformer.layers.{{}}"
    names = {f"attention.{x}": f"attention.{x[0]}_proj" for x in (*QKV, "out")}
    names |= {f"mlp.{x}": f"feed_forward.{x}_proj" for x in ("gate", "up", "down")}
    names |= {"attention_norm": "attention_norm", "mlp_norm": "ffn_norm"}
    table = [
        *torch_patch(f"{prefix}patch_conv"),
        *torch_layer("vision.pre_norm", f"{prefix}ln_pre"),
    ]
    for ours, name in names.items():
        table += torch_layer(f"{blocks}.{ours}", f"{theirs}.{name}")
    table += torch_layer("merger.up", f"{projector_of(prefix)}linear_1")
    table += torch_layer("merger.down", f"{projector_of(prefix)}linear_2")
    return present(table, model)
