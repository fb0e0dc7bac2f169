"""The image tower of Ovis2.5, which began as SigLIP 2's.

The language model gets the last block's tokens, before `post_layernorm`. navit applies
that norm to the pooled vector.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from navit.config import ModelConfig, PositionConfig, RotaryConfig, VisionConfig
from navit.convert.codec import Table, Tensor
from navit.convert.qwen_vision import strategy_of, windows
from navit.convert.settings import Settings
from navit.convert.stored import depth_of, shape_of, square_side
from navit.convert.tensors import QKV, torch_layer, torch_patch
from navit.convert.tower import (
    SIGLIP_COLOURS,
    Act,
    Files,
    Json,
    Owned,
    Shapes,
    Tower,
    act_name,
    begins_any,
    colours,
    filter_number,
    present,
    stated_theta,
    theta,
)
from navit.plan.strategies import QwenVL, Strategy

NAME = "Ovis2.5"
_TOWER = "visual_tokenizer.vit.vision_model."
MARKERS = tuple(
    (f"{_TOWER}{name}.weight",)
    for name in (
        "embeddings.patch_embedding",
        "embeddings.position_embedding",
        "encoder.layers.0.self_attn.q_proj",
        "post_layernorm",
    )
)
NEEDS = {
    "rotary.kind": "qwen",
    "patch_frames": 1,
    "position.kind": "siglip2",
    "position.resize": "bicubic",
    "pool_norm": True,
}
_ACTS: Mapping[str, Act] = {"gelu_pytorch_tanh": "tanh", "gelu": "exact"}
_BOUNDS = (448 * 448, 1344 * 1792)  # of an image's area, as the release has them


def owned(names: Collection[str], prefix: str) -> Owned:
    head = begins_any(names, f"{prefix}visual_tokenizer.head.")
    own = [name for name in names if name.startswith(prefix + _TOWER)]
    return Owned(own, "its head, which makes visual words" if head else None)


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, processor = json
    vit, prefix = config.part("vit_config"), prefix + _TOWER
    vit.expect(preserve_original_pe=True, use_rope=True)
    embeddings = f"{prefix}embeddings"
    width, _, patch, _ = shape_of(
        path, stored, f"{embeddings}.patch_embedding.weight", 4
    )
    table = f"{embeddings}.position_embedding.weight"
    positions, _ = shape_of(path, stored, table, 2)
    side = square_side(path, table, positions)
    mlp_dim, _ = shape_of(path, stored, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)
    depth = depth_of(stored, rf"{prefix}encoder\.layers\.(\d+)\.")
    vit.agree(
        hidden_size=width,
        intermediate_size=mlp_dim,
        num_hidden_layers=depth,
        num_channels=3,
        patch_size=patch,
        image_size=patch * side,
        temporal_patch_size=1,
    )
    merge = vit.whole("hidden_stride", 2)
    with vit.naming():
        v = VisionConfig(
            family="ovis",
            patch_size=patch,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=vit.whole("num_attention_heads", 16),
            position=PositionConfig(size=side, resize="bicubic"),
            rotary=RotaryConfig("qwen", theta=theta(vit)),
            eps=vit.positive("layer_norm_eps", 1e-6),
            act=vit.choice("hidden_act", _ACTS, "gelu_pytorch_tanh"),
            final_norm=False,
            pool_norm=True,
            pool="mean",
            **colours(processor, SIGLIP_COLOURS),
            **_windows(vit, patch, merge),
        )
    model = ModelConfig(vision=v, text=None)
    strategy = strategy_of(processor, patch, merge, 1, _BOUNDS, "bilinear")
    return Tower(model, _table(model, prefix), strategy)


def _windows(vit: Settings, patch: int, merge: int) -> dict[str, Any]:
    """Windows, if some blocks are without; `"7|15"` and lists name those."""
    blocks = vit.data.get("fullatt_block_indexes")
    if blocks is None:
        return {}
    if isinstance(blocks, str):
        listed = [int(x) if x.isdigit() else x for x in blocks.split("|")]
        vit = Settings(vit.file, {**vit.data, "fullatt_block_indexes": listed})
    return windows(vit, patch, merge)


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    if not isinstance(strategy, QwenVL):
        low, high = _BOUNDS
        strategy = QwenVL(
            v.patch_size, min_pixels=low, max_pixels=high, resample="bilinear"
        )
    vit: dict[str, Any] = {
        "model_type": "siglip2_navit",
        "patch_size": v.patch_size,
        "image_size": v.patch_size * v.position.size,
        "num_patches": -1,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "hidden_act": act_name(v, _ACTS, NAME),
        "layer_norm_eps": v.eps,
        "hidden_stride": strategy.merge,
        "window_size": v.window * v.patch_size or 112,
        "fullatt_block_indexes": "|".join(map(str, v.full_blocks)) or None,
        "temporal_patch_size": 1,
        "preserve_original_pe": True,
        "use_rope": True,
        **stated_theta(v),
    }
    json: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "ovis2_5", "vit_config": vit},
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "min_pixels": strategy.min_pixels,
            "max_pixels": strategy.max_pixels,
            "resample": filter_number(strategy.resample),
            "image_mean": list(v.mean),
            "image_std": list(v.std),
        },
    }
    return Files(json, _table(model, _TOWER), "")


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
