"""MoonViT (moonshotai/MoonViT-SO-400M), by itself or inside Kimi-VL.

It stores the pairs of channels that rotary positions turn side by side, column before
row, where navit has all first channels before all second ones, row before column.
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
from navit.convert.stored import depth_of, shape_of
from navit.convert.tensors import joined, torch_layer, torch_patch
from navit.convert.tower import (
    HALF,
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
from navit.plan.strategies import Kimi, Strategy

NAME = "MoonViT"
_TOWER = "vision_tower."


def find(names: Collection[str]) -> str | None:
    return prefix_of(names, "encoder.blocks.0.wqkv.weight")


def owned(names: Collection[str], prefix: str) -> list[str]:
    projector = projector_of(prefix)
    begins = (prefix, projector) if projector else (prefix,)
    return [name for name in names if name.startswith(begins)]


def is_like(model: ModelConfig) -> bool:
    rotary = model.vision.rotary
    return rotary is not None and rotary.kind == "moonvit"


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config = json["config.json"]
    vision = member(
        path / "config.json", config, "vision_config", dict, "an object", config
    )

    def shape(name: str, *axes: int) -> tuple[int, ...]:
        return shape_of(path, stored, name, *axes)

    width, _, patch, _ = shape(f"{prefix}patch_embed.proj.weight", 4)
    rows, columns, _ = shape(f"{prefix}patch_embed.pos_emb.weight", 3)
    if rows != columns:
        raise ValueError(
            f"{path}: {prefix}patch_embed.pos_emb.weight has {rows}x{columns} "
            "positions, which is not a square"
        )
    mlp_dim, _ = shape(f"{prefix}encoder.blocks.0.mlp.fc0.weight", 2)
    if (merge := vision.get("merge_kernel_size", [2, 2])) != [2, 2]:
        raise ValueError(
            f"{path / 'config.json'}: merge_kernel_size={merge!r} is not supported; "
            "MoonViT's is [2, 2]"
        )
    merger, projector = None, projector_of(prefix)
    if projector and any(name.startswith(projector) for name in stored):
        out_dim, _ = shape(f"{projector}linear_2.weight", 2)
        merger = MergerConfig(out_dim=out_dim, side=2, eps=1e-5)
    mean, std = colours(path, json, HALF, HALF)
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch,
            width=width,
            depth=depth_of(stored, rf"{prefix}encoder\.blocks\.(\d+)\."),
            mlp_dim=mlp_dim,
            num_heads=number(path, vision, "num_attention_heads", 16),
            position=PositionConfig(size=rows, resize="bicubic"),
            rotary=RotaryConfig("moonvit"),
            eps=1e-5,
            pool="mean",
            mean=mean,
            std=std,
        ),
        text=None,
        merger=merger,
    )
    limit = json.get("preprocessor_config.json", {}).get("in_token_limit", 4096)
    strategy = Kimi(patch=patch, max_tokens=limit, merge=2)
    return Tower(model, _table(model, prefix), strategy)


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    """Kimi-VL's names if there is a projector, else those of the tower by itself."""
    v = model.vision
    vision: dict[str, Any] = {
        "model_type": "moonvit",
        "patch_size": v.patch_size,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "init_pos_emb_height": v.position.size,
        "init_pos_emb_width": v.position.size,
        "merge_kernel_size": [2, 2],
    }
    prefix = "" if model.merger is None else _TOWER
    config = {"model_type": "kimi_vl", "vision_config": vision} if prefix else vision
    limit = strategy.max_tokens if isinstance(strategy, Kimi) else 4096
    preprocessor = {
        "image_processor_type": "KimiVLImageProcessor",
        "patch_size": v.patch_size,
        "in_token_limit": limit,
        "pad_input": True,
        "merge_kernel_size": [2, 2],
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }
    json = {"config.json": config, "preprocessor_config.json": preprocessor}
    return Files(json, _table(model, prefix), prefix)


def _table(model: ModelConfig, prefix: str) -> Table:
    blocks, theirs = "vision.encoder.blocks", f"{prefix}encoder.blocks.{{}}"
    kernels, biases = joined(f"{blocks}.attention")
    turned = "i (h pair xy f) -> (h f ~xy pair) i"
    turned_bias = "(h pair xy f) -> (h f ~xy pair)"
    table = [
        *torch_patch(f"{prefix}patch_embed.proj"),
        Tensor(f"{prefix}patch_embed.pos_emb.weight", ("vision.position.table",)),
        *torch_layer(f"{blocks}.attention_norm", f"{theirs}.norm0"),
        Tensor(f"{theirs}.wqkv.weight", kernels, (turned, turned, "i o -> o i")),
        Tensor(f"{theirs}.wqkv.bias", biases, (turned_bias, turned_bias, None)),
        *torch_layer(f"{blocks}.attention.out", f"{theirs}.wo"),
        *torch_layer(f"{blocks}.mlp_norm", f"{theirs}.norm1"),
        *torch_layer(f"{blocks}.mlp.up", f"{theirs}.mlp.fc0"),
        *torch_layer(f"{blocks}.mlp.down", f"{theirs}.mlp.fc1"),
        *torch_layer("vision.encoder.norm", f"{prefix}encoder.final_layernorm"),
    ]
    if model.merger is not None:
        projector = projector_of(prefix)
        table += torch_layer("merger.norm", f"{projector}pre_norm")
        table += torch_layer("merger.up", f"{projector}linear_1")
        table += torch_layer("merger.down", f"{projector}linear_2")
    return present(table, model)
