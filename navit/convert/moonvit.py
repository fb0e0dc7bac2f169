"""MoonViT (moonshotai/MoonViT-SO-400M), by itself or inside Kimi-VL and Kimi-K2.5.

It stores the pairs of channels that rotary positions turn side by side, column before
row, where navit has all first channels before all second ones, row before column.
Kimi-K2.5's tower has the same tensors and adds nothing to still images.
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
from navit.convert.settings import Settings
from navit.convert.stored import depth_of, shape_of
from navit.convert.tensors import joined, torch_layer, torch_patch
from navit.convert.tower import (
    SIGLIP_COLOURS,
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
from navit.plan.strategies import Kimi, Strategy

NAME = "MoonViT"
MARKERS = (
    ("patch_embed.proj.weight",),
    ("patch_embed.pos_emb.weight",),
    ("encoder.blocks.0.wqkv.weight",),
    ("encoder.blocks.0.wo.weight",),
    ("encoder.final_layernorm.weight",),
)
NEEDS = {"rotary.kind": "moonvit", "position.kind": "siglip2", "pool": "mean"}
_TOWER = "vision_tower."
# The projectors of Kimi-VL and Kimi-K2.5: how their names begin, and their layers.
_PROJECTORS = {
    "multi_modal_projector.": ("pre_norm", "linear_1", "linear_2"),
    "mm_projector.": ("pre_norm", "proj.0", "proj.2"),
}


def owned(names: Collection[str], prefix: str) -> Owned:
    projector = _projector(names, prefix)
    begins = (prefix, projector) if projector else (prefix,)
    own = [name for name in names if name.startswith(begins)]
    outer = prefix.removesuffix(_TOWER)
    other = any(begins_any(names, outer + each) for each in _PROJECTORS)
    return Owned(own, "its projector" if other and not projector else None)


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, processor = json
    vision = config.part("vision_config") if "vision_config" in config.data else config

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
    depth = depth_of(stored, rf"{prefix}encoder\.blocks\.(\d+)\.")
    k25 = "vt_" if "vt_num_attention_heads" in vision.data else ""
    sizes = dict(hidden_size=width, intermediate_size=mlp_dim, num_hidden_layers=depth)
    vision.agree(
        patch_size=patch,
        init_pos_emb_height=rows,
        init_pos_emb_width=rows,
        **{k25 + key: size for key, size in sizes.items()},
    )
    _expect_blocks_of_2(vision)
    merger, projector = None, _projector(stored, prefix)
    if projector:
        _, _, last = _PROJECTORS[projector.removeprefix(prefix.removesuffix(_TOWER))]
        out_dim, _ = shape(f"{projector}{last}.weight", 2)
        eps = vision.positive("projector_ln_eps", 1e-5)
        merger = MergerConfig(out_dim=out_dim, side=2, eps=eps)
    with config.naming():
        v = VisionConfig(
            family="moonvit",
            patch_size=patch,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=vision.whole(f"{k25}num_attention_heads", 16),
            position=PositionConfig(size=rows, resize="bicubic"),
            rotary=RotaryConfig("moonvit", theta=theta(vision)),
            eps=1e-5,
            pool="mean",
            **colours(_pixels(processor), SIGLIP_COLOURS),
        )
    model = ModelConfig(vision=v, text=None, merger=merger)
    limit = _limit(processor, patch, 16384 if k25 else 4096)
    return Tower(model, _table(model, prefix, projector), Kimi(patch, limit, merge=2))


def _pixels(processor: Settings) -> Settings:
    """The settings of pixels, which Kimi-K2.5's file has in an object of their own."""
    inner = processor.part("media_proc_cfg", optional=True)
    return inner if inner.data else processor


def _limit(processor: Settings, patch: int, default: int) -> int:
    """The most patches of an image."""
    pixels = _pixels(processor)
    check_pixels(pixels, patch_size=patch, merge_size=2)
    _expect_blocks_of_2(pixels)
    pixels.expect(pad_input=True, resample=3, fixed_output_tokens=None)
    # Kimi-K2.5's, in the release and as transformers writes it; or Kimi-VL's.
    stated = (x for x in ("in_patch_limit", "max_patches") if x in pixels.data)
    return pixels.whole(next(stated, "in_token_limit"), default)


def _expect_blocks_of_2(settings: Settings) -> None:
    kernel = settings.data.get("merge_kernel_size", 2)
    if kernel not in (2, [2, 2]):
        raise ValueError(
            f"{settings.file}: merge_kernel_size={kernel!r} is not supported; "
            "MoonViT's is [2, 2]"
        )


def _projector(names: Collection[str], prefix: str) -> str | None:
    """How the names of the projector begin; None if there is none that navit knows.

    Kimi-K3's has a norm at its end.
    """
    if not prefix.endswith(_TOWER):
        return None
    for begin, layers in _PROJECTORS.items():
        begin = prefix.removesuffix(_TOWER) + begin
        known = f"{begin}post_norm.weight" not in names
        if known and any(f"{begin}{layer}.weight" in names for layer in layers):
            return begin
    return None


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
        **stated_theta(v),
    }
    prefix = "" if model.merger is None else _TOWER
    if model.merger is not None:
        vision["projector_ln_eps"] = model.merger.eps
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
    projector = "multi_modal_projector." if prefix else None
    return Files(json, _table(model, prefix, projector), prefix)


def _table(model: ModelConfig, prefix: str, projector: str | None) -> Table:
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
    if projector:
        layers = _PROJECTORS[projector.removeprefix(prefix.removesuffix(_TOWER))]
        for ours, name in zip(("norm", "up", "down"), layers, strict=True):
            table += torch_layer(f"merger.{ours}", projector + name)
    return present(table, model)
