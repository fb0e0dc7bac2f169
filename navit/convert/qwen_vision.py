"""The image towers of Qwen2-VL, 2.5-VL and 3-VL, in whole models or by themselves.

Their patch kernel takes two frames of a video. Both are kept: a still image, which they
see as two equal frames, is multiplied with the sum. Qwen3-VL's deepstack mergers, which
feed the language model from blocks in the middle, are left out.

A tower without its merger is one too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from navit.config import (
    MergerConfig,
    ModelConfig,
    PositionConfig,
    RotaryConfig,
    VisionConfig,
)
from navit.convert.codec import Table, Tensor
from navit.convert.settings import Settings
from navit.convert.stored import depth_of, shape_of, square_side
from navit.convert.tensors import joined, torch_layer, torch_patch
from navit.convert.tower import (
    CLIP_COLOURS,
    SIGLIP_COLOURS,
    Act,
    Files,
    Json,
    Owned,
    Shapes,
    Tower,
    act_name,
    begins_any,
    check_pixels,
    colours,
    filter_number,
    filter_of,
    present,
    ratio_of,
    stated_theta,
    theta,
)
from navit.plan.strategies import QwenVL, Strategy

NAME = "Qwen-VL"
MARKERS = (
    ("patch_embed.proj.weight",),
    ("blocks.0.attn.qkv.weight",),
    ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.gate_proj.weight",
     "blocks.0.mlp.linear_fc1.weight"),
    ("merger.ln_q.weight", "merger.norm.weight"),
    ("merger.mlp.0.weight", "merger.linear_fc1.weight"),
    ("merger.mlp.2.weight", "merger.linear_fc2.weight"),
)  # fmt: skip
NEEDS = {"rotary.kind": "qwen", "final_norm": False, "pool": "mean"}
_DEEPSTACK = "deepstack_merger_list."
_PARTS = ("patch_embed.", "blocks.", "pos_embed.", "merger.", _DEEPSTACK)
_ACTS: Mapping[str, Act] = {
    "quick_gelu": "quick",
    "silu": "silu",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "exact",
}
# The released bounds of an image's area: Qwen2-VL's and 2.5-VL's, and Qwen3-VL's.
_BOUNDS = (56 * 56, 28 * 28 * 1280)
_BOUNDS_3 = (256 * 256, 4096 * 4096)


def lacks_merger(names: Collection[str], prefix: str) -> bool:
    """Whether this is a tower without its merger: other ViTs have more parts."""
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    parts = all(name.startswith(_PARTS) for name in own)
    return parts and not any(name.startswith("merger.") for name in own)


def owned(names: Collection[str], prefix: str) -> Owned:
    own = [name for name in names if name.startswith(prefix)]
    kept = [name for name in own if not name.startswith(prefix + _DEEPSTACK)]
    more = "its deepstack mergers, which feed the language model from other blocks"
    return Owned(kept, more if len(kept) < len(own) else None)


def tower(path: Path, json: Json, stored: Shapes, prefix: str) -> Tower:
    config, processor = json
    vision = config.part("vision_config") if "vision_config" in config.data else config

    def shape(name: str, *axes: int) -> tuple[int, ...]:
        return shape_of(path, stored, f"{prefix}{name}", *axes)

    width, colours_of_pixel, frames, patch, _ = shape("patch_embed.proj.weight", 5)
    gated = f"{prefix}blocks.0.mlp.gate_proj.weight" in stored
    third = f"{prefix}blocks.0.mlp.linear_fc1.weight" in stored  # Qwen3-VL
    first = "gate_proj" if gated else "linear_fc1" if third else "fc1"
    mlp_dim, _ = shape(f"blocks.0.mlp.{first}.weight", 2)
    depth = depth_of(stored, rf"{prefix}blocks\.(\d+)\.")
    vision.agree(
        depth=depth,
        in_channels=colours_of_pixel,
        in_chans=colours_of_pixel,
        patch_size=patch,
        spatial_patch_size=patch,
        temporal_patch_size=frames,
        intermediate_size=mlp_dim,
        **{"hidden_size" if gated or third else "embed_dim": width},
    )
    if not gated and not third:
        _check_ratio(vision, width, mlp_dim)
    merge, merger = vision.whole("spatial_merge_size", 2), None
    norm: Literal["layer", "rms"] = "rms" if gated else "layer"
    if begins_any(stored, f"{prefix}merger."):
        up, down = ("linear_fc1", "linear_fc2") if third else ("mlp.0", "mlp.2")
        _, joined_width = shape(f"merger.{up}.weight", 2)
        out_dim, _ = shape(f"merger.{down}.weight", 2)
        key = "out_hidden_size" if gated or third else "hidden_size"
        vision.agree(spatial_merge_size=math.isqrt(joined_width // width))
        vision.agree(**{key: out_dim})
        merger = MergerConfig(out_dim=out_dim, side=merge, norm=norm)
    options: dict[str, Any] = {}
    if gated:
        options |= windows(vision, patch, merge)
    position, act, release = PositionConfig(kind="none"), "quick_gelu", CLIP_COLOURS
    if gated:
        act = "silu"
    if third:
        positions, _ = shape("pos_embed.weight", 2)
        vision.agree(num_position_embeddings=positions)
        side = square_side(path, f"{prefix}pos_embed.weight", positions)
        position = PositionConfig(size=side, resize="linear-align-corners")
        act, release = "gelu_pytorch_tanh", SIGLIP_COLOURS
    with vision.naming():
        v = VisionConfig(
            family="qwen_vl",
            patch_size=patch,
            patch_frames=frames,
            width=width,
            depth=depth,
            mlp_dim=mlp_dim,
            num_heads=vision.whole("num_heads", 16),
            position=position,
            rotary=RotaryConfig("qwen", theta=theta(vision)),
            norm=norm,
            act=vision.choice("hidden_act", _ACTS, act),
            gated=gated,
            patch_bias=third,
            final_norm=False,
            pool="mean",
            **colours(processor, release),
            **options,
        )
    model = ModelConfig(vision=v, text=None, merger=merger)
    area = _BOUNDS_3 if third else _BOUNDS
    strategy = strategy_of(processor, patch, merge, frames, area, "bicubic")
    return Tower(model, _table(model, prefix), strategy)


def strategy_of(
    processor: Settings,
    patch: int,
    merge: int,
    frames: int,
    area: tuple[int, int],
    resample: Literal["bilinear", "bicubic"],
) -> QwenVL:
    """Qwen's strategy, as a processor states it.

    Args:
      frames: in a patch.
      area: the release's least and most pixels of an image.
      resample: the release's filter.
    """
    check_pixels(
        processor, patch_size=patch, temporal_patch_size=frames, merge_size=merge
    )
    low, high = _bounds(processor, *area)
    with processor.naming():
        return QwenVL(
            patch,
            merge,
            min_pixels=low,
            max_pixels=high,
            temporal_patch=frames,
            resample=filter_of(processor, resample),
        )


def _bounds(processor: Settings, low: int, high: int) -> tuple[int, int]:
    """The least and most pixels of an image, under their older or newer names."""
    size, found = processor.part("size", optional=True), []
    for key, newer, default in (
        ("min_pixels", "shortest_edge", low),
        ("max_pixels", "longest_edge", high),
    ):
        if key not in processor.data and newer in size.data:
            found.append(size.whole(newer))
        else:
            found.append(processor.whole(key, default))
    return found[0], found[1]


def windows(vision: Settings, patch: int, merge: int) -> dict[str, Any]:
    """Windows, of whole merged tokens, and the blocks of full attention."""
    pixels = vision.whole("window_size", 112)
    window = pixels // merge // patch * merge
    if not window:
        raise ValueError(
            f"{vision.file}: window_size is {pixels}, but a window has at least one "
            f"merged token, which is {merge * patch} pixels a side"
        )
    blocks: tuple[int, ...] = (7, 15, 23, 31)
    if "fullatt_block_indexes" in vision.data:
        blocks = vision.indices("fullatt_block_indexes")
    return {"window": window, "full_blocks": blocks}


def _check_ratio(vision: Settings, width: int, mlp_dim: int) -> None:
    ratio = vision.positive("mlp_ratio", float(ratio_of(mlp_dim, width)))
    if int(width * ratio) != mlp_dim:
        raise ValueError(
            f"{vision.file}: mlp_ratio is {ratio:g}, but the tensors make it "
            f"{mlp_dim}/{width}"
        )


def written(model: ModelConfig, strategy: Strategy | None) -> Files:
    v, third = model.vision, model.vision.position.kind != "none"
    if third and model.merger is not None:
        raise ValueError(
            "Qwen3-VL's layout has deepstack mergers, which navit leaves out: write "
            "the format navit (--format navit)"
        )
    if v.gated and not v.window:
        raise ValueError(
            f"{NAME}'s layout does not support model.vision.window=0 of a gated tower, "
            "as Qwen2.5-VL's has windows: write the format navit (--format navit)"
        )
    if not isinstance(strategy, QwenVL):
        low, high = _BOUNDS_3 if third else _BOUNDS
        strategy = QwenVL(v.patch_size, min_pixels=low, max_pixels=high)
    side = model.merger.side if model.merger else strategy.merge
    vision: dict[str, Any] = {
        "depth": v.depth,
        "num_heads": v.num_heads,
        "hidden_act": act_name(v, _ACTS, NAME),
        "in_channels": 3,
        "patch_size": v.patch_size,
        "spatial_merge_size": side,
        "temporal_patch_size": v.patch_frames,
        **stated_theta(v),
    }
    kind = "qwen2_5_vl" if v.gated else "qwen3_vl" if third else "qwen2_vl"
    if v.gated or third:
        vision |= {"hidden_size": v.width, "intermediate_size": v.mlp_dim}
    else:
        vision |= {"embed_dim": v.width, "mlp_ratio": ratio_of(v.mlp_dim, v.width)}
    if v.gated:
        vision["window_size"] = v.window * v.patch_size
        vision["fullatt_block_indexes"] = list(v.full_blocks)
    if third:
        vision["num_position_embeddings"] = v.position.size**2
        vision["deepstack_visual_indexes"] = []
    if model.merger:
        vision["out_hidden_size" if v.gated else "hidden_size"] = model.merger.out_dim
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": v.patch_size,
        "temporal_patch_size": v.patch_frames,
        "merge_size": side,
        "min_pixels": strategy.min_pixels,
        "max_pixels": strategy.max_pixels,
        "resample": filter_number(strategy.resample),
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }
    config: dict[str, Any] = {"model_type": kind, "vision_config": vision}
    json = {"config.json": config, "preprocessor_config.json": preprocessor}
    return Files(json, _table(model, "visual."), "visual.")


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
