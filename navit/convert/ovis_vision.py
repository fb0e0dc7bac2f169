"""The image tower of Ovis2.5, which began as SigLIP 2's.

The language model gets the last block's tokens, before `post_layernorm`. navit applies
that norm to the pooled vector.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from navit.config import ModelConfig, PositionConfig, RotaryConfig, VisionConfig
from navit.convert.codec import Table, Tensor
from navit.convert.huggingface_config import member
from navit.convert.stored import depth_of, shape_of, square_side
from navit.convert.tensors import QKV, torch_layer, torch_patch
from navit.convert.tower import (
    HALF,
    Files,
    Json,
    Shapes,
    Tower,
    choice,
    colours,
    number,
    present,
)
from navit.plan.strategies import QwenVL, Strategy

NAME = "Ovis2.5"
_PREFIX = "visual_tokenizer.vit.vision_model."
_ACTS = {"gelu_pytorch_tanh": "tanh", "gelu": "exact"}


def find(names: Collection[str]) -> str | None:
    first = f"{_PREFIX}encoder.layers.0.self_attn.q_proj.weight"
    return _PREFIX if first in names else None


def owned(names: Collection[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def is_like(model: ModelConfig) -> bool:
    v = model.vision
    rotary = v.rotary is not None and v.rotary.kind == "qwen"
    return rotary and v.patch_frames == 1 and v.position.resize == "bicubic"


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, file = json["config.json"], path / "config.json"
    vit = member(file, config, "vit_config", dict, "an object")
    for key, want in (("preserve_original_pe", True), ("use_rope", True)):
        choice(path, vit, key, {want: want}, want)
    embeddings = f"{prefix}embeddings"
    width, _, patch, _ = shape_of(
        path, stored, f"{embeddings}.patch_embedding.weight", 4
    )
    table = f"{embeddings}.position_embedding.weight"
    positions, _ = shape_of(path, stored, table, 2)
    mlp_dim, _ = shape_of(path, stored, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)
    merge = number(path, vit, "hidden_stride", 2)
    windows: dict[str, Any] = {}
    full = vit.get("fullatt_block_indexes")
    if full is not None:
        window = number(path, vit, "window_size", 112) // merge // patch * merge
        blocks = tuple(int(x) for x in str(full).split("|"))
        windows = {"window": window, "full_blocks": blocks}
    mean, std = colours(path, json, HALF, HALF)
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=patch,
            width=width,
            depth=depth_of(stored, rf"{prefix}encoder\.layers\.(\d+)\."),
            mlp_dim=mlp_dim,
            num_heads=number(path, vit, "num_attention_heads", 16),
            position=PositionConfig(
                size=square_side(path, table, positions), resize="bicubic"
            ),
            rotary=RotaryConfig("qwen"),
            act=choice(path, vit, "hidden_act", _ACTS, "gelu_pytorch_tanh"),
            final_norm=False,
            pool_norm=True,
            pool="mean",
            mean=mean,
            std=std,
            **windows,
        ),
        text=None,
    )
    strategy = QwenVL(patch, merge, min_pixels=448**2, max_pixels=1344 * 1792)
    return Tower(model, _table(model, prefix), strategy)


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    vit: dict[str, Any] = {
        "model_type": "siglip2_navit",
        "patch_size": v.patch_size,
        "image_size": v.patch_size * v.position.size,
        "num_patches": -1,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "hidden_act": next(name for name, act in _ACTS.items() if act == v.act),
        "layer_norm_eps": v.eps,
        "hidden_stride": strategy.merge if isinstance(strategy, QwenVL) else 2,
        "window_size": v.window * v.patch_size or 112,
        "fullatt_block_indexes": "|".join(map(str, v.full_blocks)) or None,
        "temporal_patch_size": 1,
        "preserve_original_pe": True,
        "use_rope": True,
    }
    json: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "ovis2_5", "vit_config": vit},
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "image_mean": list(v.mean),
            "image_std": list(v.std),
        },
    }
    return Files(json, _table(model, _PREFIX), _PREFIX)


def _table(model: ModelConfig, prefix: str) -> Table:
    blocks, theirs = "vision.encoder.blocks", f"{prefix}encoder.layers.{{}}"
    names = {f"attention.{x}": f"self_attn.{x[0]}_proj" for x in QKV}
    names |= {"attention.out": "self_attn.out_proj"}
    names |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    names |= {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
    embeddings = f"{prefix}embeddings"
    table = [
        *torch_patch(f"{embeddings}.patch_embedding"),
        Tensor(
            f"{embeddings}.position_embedding.weight",
            ("vision.position.table",),
            "y x d -> (y x) d",
        ),
        *torch_layer("vision.pool_norm", f"{prefix}post_layernorm"),
    ]
    for ours, name in names.items():
        table += torch_layer(f"{blocks}.{ours}", f"{theirs}.{name}")
    return present(table, model)
