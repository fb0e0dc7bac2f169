"""timm's NaFlexViT: `naflexvit_*`, safetensors with their config.json.

config.json names the architecture, which implies settings that the tensors do not show;
`model_args` in it has those that differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from navit.config import ModelConfig, PositionConfig, VisionConfig
from navit.convert.codec import Table, Tensor
from navit.convert.settings import Settings
from navit.convert.stored import depth_of, shape_of
from navit.convert.tensors import joined, torch_layer
from navit.convert.tower import (
    SIGLIP_COLOURS,
    Act,
    Files,
    Json,
    Owned,
    Shapes,
    Tower,
    act_name,
    present,
    ratio_of,
)
from navit.plan.strategies import NaFlex, Strategy

NAME = "NaFlexViT"
MARKERS = (
    ("embeds.proj.weight",),
    ("embeds.pos_embed", "embeds.pos_embed_y"),
    ("blocks.0.attn.qkv.weight",),
    ("blocks.0.mlp.fc1.weight",),
)
NEEDS = {"rotary": None, "norm": "layer", "qk_norm": False, "embed_dim": None}
_NOT_SUPPORTED = (
    "rope_type",
    "pool_include_prefix",
    "pos_embed_use_grid_sample",
    "norm_layer",
    "mlp_layer",
    "block_fn",
)
Resize = Literal[
    "linear-antialias", "bicubic", "bicubic-antialias", "linear-align-corners"
]
_FILTERS: Mapping[str, Literal["bilinear", "bicubic"]] = {
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}
_POOLS: Mapping[str, Literal["map", "mean", "max"]] = {
    "map": "map",
    "avg": "mean",
    "max": "max",
}
_ACTS: Mapping[str, Act] = {
    "gelu": "exact",
    "gelu_tanh": "tanh",
    "quick_gelu": "quick",
    "silu": "silu",
}
# (mode, antialias, align_corners) -> how the position table is resized.
_RESIZES: Mapping[tuple[str, bool, bool], Resize] = {
    ("bilinear", True, False): "linear-antialias",
    ("bilinear", False, True): "linear-align-corners",
    ("bicubic", False, False): "bicubic",
    ("bicubic", True, False): "bicubic-antialias",
}


def owned(names: Collection[str], prefix: str) -> Owned:
    return Owned([name for name in names if name.startswith(prefix)])


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config = json.config
    name = config.text("architecture")
    args = config.part("model_args", optional=True)
    data = config.part("pretrained_cfg", optional=True)
    siglip = "siglip" in name

    def shape(part: str, *axes: int) -> tuple[int, ...]:
        return shape_of(path, stored, f"{prefix}{part}", *axes)

    for key in _NOT_SUPPORTED:
        if args.data.get(key) not in (None, "", "none", False):
            raise ValueError(
                f"{config.file}: {key}={args.data[key]!r} is not supported"
            )
    width, pixels = shape("embeds.proj.weight", 2)
    patch = math.isqrt(pixels // 3)
    mlp_dim, _ = shape("blocks.0.mlp.fc1.weight", 2)
    depth = depth_of(stored, rf"{prefix}blocks\.(\d+)\.")
    has_registers = f"{prefix}embeds.reg_token" in stored
    registers = shape("embeds.reg_token", 3)[1] if has_registers else 0
    classes = f"{prefix}head.weight" in stored
    num_classes = shape("head.weight", 2)[0] if classes else 0
    args.agree(
        embed_dim=width,
        depth=depth,
        patch_size=patch,
        in_chans=3,
        reg_tokens=registers,
        num_classes=num_classes,
    )
    attends = f"{prefix}attn_pool.latent" in stored
    pools = args if "global_pool" in args.data else config
    pool = pools.choice("global_pool", _POOLS, "avg")
    heads = 16 if "so400m" in name else max(1, width // 64)
    if "num_heads" in args.data:
        heads = args.whole("num_heads")
    args.expect(patchify_channels_last=True)
    if attends and args.data.get("attn_pool_num_heads") is not None:
        args.expect(attn_pool_num_heads=heads)
    acts = "gelu_tanh" if siglip else "gelu"
    scaled = f"{prefix}blocks.0.ls1.gamma" in stored
    with config.naming():
        vision = VisionConfig(
            family="timm",
            patch_size=patch,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=heads,
            position=_position(path, args, stored, prefix, name),
            act=args.choice("act_layer", _ACTS, acts),
            final_norm=f"{prefix}norm.weight" in stored,
            pool_norm=f"{prefix}fc_norm.weight" in stored,
            layer_scale=args.positive("init_values", 1e-5) if scaled else None,
            registers=registers,
            pool="map" if attends else pool,
            num_classes=num_classes,
            mean=data.colours("mean", SIGLIP_COLOURS[0], zero=True),
            std=data.colours("std", SIGLIP_COLOURS[1], zero=False),
        )
    model = ModelConfig(vision=vision, text=None)
    strategy = None
    if not siglip:
        # The tag says the most patches in training; timm resizes its images like this.
        tag = re.search(r"\bs(\d+)", data.text("tag", "").replace("_", " "))
        strategy = NaFlex(
            patch,
            int(tag[1]) if tag else 256,
            resample=data.choice("interpolation", _FILTERS, "bicubic"),
        )
    return Tower(model, _table(model, prefix), strategy)


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v = model.vision
    position = v.position
    factorized, square = position.kind == "factorized", position.frame == "square"
    square |= position.coordinates == "fractional_aspect"
    kind = "map" if v.pool == "map" else "gap"
    if kind == "map" and strategy is None:
        kind = "siglip"  # whose images SigLIP 2's own rule resizes
    if kind == "gap" and (factorized or square):
        kind = f"par{'fac' if factorized else ''}_gap"
    side = position.size
    (resize,) = (x for x, name in _RESIZES.items() if name == position.resize)
    pool = {"map": "map", "mean": "avg", "max": "max"}.get(v.pool, v.pool)
    args: dict[str, Any] = {
        "embed_dim": v.width,
        "depth": v.depth,
        "num_heads": v.num_heads,
        "mlp_ratio": ratio_of(v.mlp_dim, v.width),
        "patch_size": v.patch_size,
        "act_layer": act_name(v, _ACTS, NAME),
        "init_values": v.layer_scale,
        "reg_tokens": v.registers,
        "pos_embed": "factorized" if factorized else "learned",
        "pos_embed_grid_size": [side, side],
        "pos_embed_ar_preserving": square,
        "pos_embed_interp_mode": "bicubic" if factorized else resize[0],
        "pos_embed_antialias": True if factorized else resize[1],
        "pos_embed_align_corners": False if factorized else resize[2],
        "final_norm": v.final_norm or v.pool_norm,
        "fc_norm": v.pool_norm,
        "global_pool": pool,
        "num_classes": v.num_classes,
    }
    data: dict[str, Any] = {
        "input_size": [3, 384, 384],
        "mean": list(v.mean),
        "std": list(v.std),
        "num_classes": v.num_classes,
        "first_conv": "embeds.proj",
        "classifier": "head",
    }
    if isinstance(strategy, NaFlex):
        data["interpolation"] = strategy.resample
        data["tag"] = f"s{strategy.max_tokens}"
    config = {
        "architecture": f"naflexvit_base_patch16_{kind}",
        "num_classes": v.num_classes,
        "num_features": v.width,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": data,
    }
    return Files({"config.json": config}, _table(model, ""), "")


def _position(
    path: Path, args: Settings, stored: Shapes, prefix: str, name: str
) -> PositionConfig:
    square = args.choice(
        "pos_embed_ar_preserving", {True: True, False: False}, "_par" in name
    )
    if f"{prefix}embeds.pos_embed_y" in stored:
        _, size, _ = shape_of(path, stored, f"{prefix}embeds.pos_embed_y", 3)
        args.agree(pos_embed_grid_size=size)
        return PositionConfig(
            "factorized",
            size=size,
            coordinates="fractional_aspect" if square else "fractional",
        )
    _, size, columns, _ = shape_of(path, stored, f"{prefix}embeds.pos_embed", 4)
    if size != columns:
        raise ValueError(
            f"{path}: {prefix}embeds.pos_embed has {size}x{columns} positions, which "
            "is not a square"
        )
    args.agree(pos_embed_grid_size=size)
    mode = args.text(
        "pos_embed_interp_mode", "bilinear" if "siglip" in name else "bicubic"
    )
    antialias = args.data.get("pos_embed_antialias", True)
    corners = args.data.get("pos_embed_align_corners", False)
    three = "pos_embed_interp_mode, pos_embed_antialias, pos_embed_align_corners"
    stated = Settings(args.file, {three: (mode, antialias, corners)})
    resize = stated.choice(three, _RESIZES, None)
    return PositionConfig(
        "siglip2", size=size, resize=resize, frame="square" if square else "own"
    )


def _table(model: ModelConfig, prefix: str) -> Table:
    blocks, theirs = "vision.encoder.blocks", f"{prefix}blocks.{{}}"
    kernels, biases = joined(f"{blocks}.attention")
    pool = f"{prefix}attn_pool"
    pool_kernels, pool_biases = joined("vision.head", ("key", "value"))
    return present(
        [
            *torch_layer("vision.patch", f"{prefix}embeds.proj"),
            Tensor(
                f"{prefix}embeds.pos_embed",
                ("vision.position.table",),
                "y x d -> 1 y x d",
            ),
            Tensor(
                f"{prefix}embeds.pos_embed_y",
                ("vision.position.row.table",),
                "y d -> 1 y d",
            ),
            Tensor(
                f"{prefix}embeds.pos_embed_x",
                ("vision.position.column.table",),
                "x d -> 1 x d",
            ),
            Tensor(f"{prefix}embeds.reg_token", ("vision.registers",), "r d -> 1 r d"),
            *torch_layer(f"{blocks}.attention_norm", f"{theirs}.norm1"),
            Tensor(f"{theirs}.attn.qkv.weight", kernels, "i o -> o i"),
            Tensor(f"{theirs}.attn.qkv.bias", biases),
            *torch_layer(f"{blocks}.attention.out", f"{theirs}.attn.proj"),
            Tensor(f"{theirs}.ls1.gamma", (f"{blocks}.attention_scale",)),
            *torch_layer(f"{blocks}.mlp_norm", f"{theirs}.norm2"),
            *torch_layer(f"{blocks}.mlp.up", f"{theirs}.mlp.fc1"),
            *torch_layer(f"{blocks}.mlp.down", f"{theirs}.mlp.fc2"),
            Tensor(f"{theirs}.ls2.gamma", (f"{blocks}.mlp_scale",)),
            *torch_layer("vision.encoder.norm", f"{prefix}norm"),
            *torch_layer("vision.pool_norm", f"{prefix}fc_norm"),
            Tensor(f"{pool}.latent", ("vision.head.probe",), "q d -> 1 q d"),
            *torch_layer("vision.head.query", f"{pool}.q"),
            Tensor(f"{pool}.kv.weight", pool_kernels, "i o -> o i"),
            Tensor(f"{pool}.kv.bias", pool_biases),
            *torch_layer("vision.head.out", f"{pool}.proj"),
            *torch_layer("vision.head.norm", f"{pool}.norm"),
            *torch_layer("vision.head.mlp.up", f"{pool}.mlp.fc1"),
            *torch_layer("vision.head.mlp.down", f"{pool}.mlp.fc2"),
            *torch_layer("vision.classifier", f"{prefix}head"),
        ],
        model,
    )
