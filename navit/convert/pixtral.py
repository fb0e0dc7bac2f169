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
from navit.convert.stored import depth_of, shape_of
from navit.convert.tensors import QKV, torch_layer, torch_patch
from navit.convert.tower import (
    CLIP_COLOURS,
    Files,
    Json,
    Owned,
    Shapes,
    Tower,
    begins_any,
    check_pixels,
    colours,
    present,
    stated_theta,
    theta,
)
from navit.plan.strategies import Pixtral, Strategy

NAME = "Pixtral"
_LAYER = "transformer.layers.0"
MARKERS = (
    ("patch_conv.weight",),
    ("ln_pre.weight",),
    (f"{_LAYER}.attention.q_proj.weight",),
    (f"{_LAYER}.feed_forward.gate_proj.weight",),
)
NEEDS = {"rotary.kind": "pixtral", "position.kind": "none", "pool": "mean"}
_TOWER = "vision_tower."


def owned(names: Collection[str], prefix: str) -> Owned:
    projector = _projector(prefix)
    if projector and begins_any(names, f"{projector}patch_merger."):
        kept = [name for name in names if name.startswith(prefix)]
        return Owned(kept, "its projector, which merges patches in another way")
    begins = (prefix, projector) if projector else (prefix,)
    return Owned([name for name in names if name.startswith(begins)])


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, processor = json
    vision = config.part("vision_config") if "vision_config" in config.data else config
    width, _, patch, _ = shape_of(path, stored, f"{prefix}patch_conv.weight", 4)
    layers = f"{prefix}transformer.layers"
    mlp_dim, _ = shape_of(path, stored, f"{layers}.0.feed_forward.gate_proj.weight", 2)
    depth, heads = depth_of(stored, rf"{layers}\.(\d+)\."), 16
    if "head_dim" in vision.data:
        heads = max(1, width // vision.whole("head_dim"))
    heads = vision.whole("num_attention_heads", heads)
    vision.agree(
        hidden_size=width,
        intermediate_size=mlp_dim,
        num_hidden_layers=depth,
        num_channels=3,
        patch_size=patch,
        head_dim=width // heads,
    )
    # The first releases' configs say "gelu", and were corrected.
    vision.choice("hidden_act", {"silu": True, "gelu": True}, "silu")
    merger, projector = None, _projector(prefix)
    if projector and begins_any(stored, projector):
        out_dim, hidden = shape_of(path, stored, f"{projector}linear_2.weight", 2)
        config.expect(vision_feature_layer=-1, projector_hidden_act="gelu")
        merger = MergerConfig(out_dim=out_dim, side=1, norm="none", hidden_dim=hidden)
    with vision.naming():
        v = VisionConfig(
            family="pixtral",
            patch_size=patch,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=heads,
            position=PositionConfig(kind="none"),
            rotary=RotaryConfig("pixtral", theta=theta(vision)),
            norm="rms",
            eps=1e-5,
            act="silu",
            gated=True,
            use_bias=False,
            pre_norm=True,
            final_norm=False,
            pool="mean",
            **colours(processor, CLIP_COLOURS),
        )
    model = ModelConfig(vision=v, text=None, merger=merger)
    check_pixels(processor, patch_size=patch)
    processor.expect(resample=3)
    size = processor.part("size", optional=True)
    side = size.whole("longest_edge") if size.data else vision.whole("image_size", 1024)
    merges = "spatial_merge_size" in config.data  # Mistral Small's
    merge = config.whole("spatial_merge_size") if merges else 1
    strategy = Pixtral(patch, side, merge=merge)
    return Tower(model, _table(model, prefix), strategy)


def _projector(prefix: str) -> str | None:
    """How the names of the projector begin, if the tower is part of a whole model."""
    if not prefix.endswith(_TOWER):
        return None
    return prefix.removesuffix(_TOWER) + "multi_modal_projector."


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    if not isinstance(strategy, Pixtral):
        strategy = Pixtral(v.patch_size)
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "patch_size": v.patch_size,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "hidden_act": "silu",
        "image_size": strategy.side,
        **stated_theta(v),
    }
    config: dict[str, Any] = {"model_type": "llava", "vision_config": vision}
    if strategy.merge > 1:
        config["spatial_merge_size"] = strategy.merge
    preprocessor = {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": v.patch_size, "width": v.patch_size},
        "size": {"longest_edge": strategy.side},
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
    table += torch_layer("merger.up", f"{_projector(prefix)}linear_1")
    table += torch_layer("merger.down", f"{_projector(prefix)}linear_2")
    return present(table, model)
