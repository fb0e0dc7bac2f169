"""Makes the golden files of Qwen2-VL, 2.5-VL and 3-VL, by transformers' own classes.

pip install torch transformers safetensors && python tests/golden/make_qwen.py
"""

import json

import numpy as np
import torch
from encoders import GRIDS, blocks, fresh, in_rows, random, randomize, write_json
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


def qwen(name, model, settings, rng, *, window):
    """A Qwen tower in a whole-model file, or for 2.5 by itself, and its outputs."""
    folder, p = fresh(name), settings["patch_size"]
    randomize(model, rng)
    out = {"grids": np.array(GRIDS, np.int32)}

    def encode(pixels, grid):
        thw = torch.tensor([[1, *grid]])
        with torch.no_grad():
            found = model(pixels, grid_thw=thw)
        order, tokens = blocks(grid), found.last_hidden_state
        if window:
            index, lengths = get_vision_window_index(
                thw,
                spatial_merge_size=2,
                window_size=settings["window_size"],
                patch_size=p,
            )
            units = in_rows(tokens.reshape(len(index), 4, -1), index)
            tokens = torch.from_numpy(units).reshape(tokens.shape)
            lengths = lengths.unique_consecutive().diff()
            ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            ids = in_rows(ids.reshape(-1, 4), index).reshape(-1)
            windows.append(in_rows(torch.from_numpy(ids), order))
        merged = found.pooler_output.reshape(grid[0] // 2, grid[1] // 2, -1)
        return in_rows(tokens, order), merged.numpy()

    windows = []
    for i, grid in enumerate(GRIDS):
        n = grid[0] * grid[1]
        patches = random(rng, n, p, p, 3)
        out[f"patches_{i}"] = patches.reshape(n, -1).numpy()
        still = patches.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
        tokens, merged = encode(still.reshape(n, -1)[blocks(grid)], grid)
        out[f"tokens_{i}"], out[f"merged_{i}"] = tokens, merged
        ids = get_vision_position_ids(torch.tensor([[1, *grid]]), 2)
        with torch.no_grad():
            cos, sin = model.rotary_pos_emb(torch.zeros(1), ids)
        out[f"positions_{i}"] = in_rows(ids, blocks(grid))
        out[f"cos_{i}"] = in_rows(cos, blocks(grid))
        out[f"sin_{i}"] = in_rows(sin, blocks(grid))
        if window:
            out[f"windows_{i}"] = windows[-1]

    # Two patches in time of 6x4 patches, of two frames each.
    clip = random(rng, 2, 24, 2, p, p, 3)
    out["clip"] = clip.reshape(2, 24, -1).numpy()
    pixels = clip.permute(0, 1, 5, 2, 3, 4).reshape(2, 24, -1)[:, blocks((6, 4))]
    with torch.no_grad():
        found = model(pixels.reshape(48, -1), grid_thw=torch.tensor([[2, 6, 4]]))
    out["clip_merged"] = found.pooler_output.reshape(2, 3, 2, -1).numpy()

    processor = Qwen2VLImageProcessor(
        patch_size=p, min_pixels=16 * p * p, max_pixels=100 * p * p
    )
    image = rng.integers(0, 256, (7 * p + 1, 11 * p, 3)).astype(np.uint8)
    image = image.repeat(2, 0).repeat(2, 1)[: 6 * p, : 10 * p]  # no resize
    inputs = processor(image, return_tensors="pt")
    grid = tuple(inputs["image_grid_thw"][0, 1:].tolist())
    assert grid == (6, 10)
    out["image"] = image
    out["image_tokens"], out["image_merged"] = encode(inputs["pixel_values"], grid)
    processor = json.loads(processor.to_json_string())
    kept = (
        "image_mean",
        "image_std",
        "patch_size",
        "merge_size",
        "temporal_patch_size",
    )
    preprocessor = {key: processor[key] for key in kept}
    preprocessor |= dict(min_pixels=16 * p * p, max_pixels=100 * p * p)
    preprocessor["image_processor_type"] = "Qwen2VLImageProcessor"
    write_json(folder / "preprocessor_config.json", preprocessor)

    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    kind = "qwen2_5_vl" if window else "qwen2_vl"
    config = {"model_type": kind, "vision_config": settings}
    if window:  # the tower by itself
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:  # in a whole model, in two files
        tensors = {f"visual.{k}": v for k, v in tensors.items()}
        tensors["lm_head.weight"] = random(rng, 3, 5)
        tensors["model.embed_tokens.weight"] = random(rng, 3, 5)
        names = sorted(tensors)
        parts = (names[: len(names) // 2], names[len(names) // 2 :])
        file_of = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05}-of-00002.safetensors"
            some = {x: tensors[x] for x in part}
            save_file(some, folder / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": file_of}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)
    np.savez_compressed(folder / "expected.npz", **out)


def qwen2(rng):
    settings = dict(
        depth=2,
        embed_dim=32,
        hidden_size=20,
        hidden_act="quick_gelu",
        mlp_ratio=2,
        num_heads=2,
        in_channels=3,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    model = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**settings))
    qwen("qwen2_vl", model, settings, rng, window=False)


def qwen2_5(rng):
    settings = dict(
        depth=3,
        hidden_size=24,
        hidden_act="silu",
        intermediate_size=37,
        num_heads=2,
        in_channels=3,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=16,
        out_hidden_size=20,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    config = Qwen2_5_VLVisionConfig(**settings)
    model = Qwen2_5_VisionTransformerPretrainedModel(config)
    qwen("qwen2_5_vl", model, settings, rng, window=True)


def qwen3(rng):
    folder, p = fresh("qwen3_vl"), 4
    settings = dict(
        depth=2,
        hidden_size=24,
        hidden_act="gelu_pytorch_tanh",
        intermediate_size=40,
        num_heads=2,
        patch_size=p,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=20,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0],
    )
    model = randomize(Qwen3VLVisionModel(Qwen3VLVisionConfig(**settings)), rng)
    grids = [*GRIDS, (6, 6), (14, 2)]
    out = {"grids": np.array(grids, np.int32)}
    for i, grid in enumerate(grids):
        n = grid[0] * grid[1]
        patches = random(rng, n, p, p, 3)
        still = patches.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
        with torch.no_grad():
            found = model(
                still.reshape(n, -1)[blocks(grid)], grid_thw=torch.tensor([[1, *grid]])
            )
        merged = found.pooler_output.reshape(grid[0] // 2, grid[1] // 2, -1)
        out[f"patches_{i}"] = patches.reshape(n, -1).numpy()
        out[f"tokens_{i}"] = in_rows(found.last_hidden_state, blocks(grid))
        out[f"merged_{i}"] = merged.numpy()
    tensors = {
        f"model.visual.{k}": v.contiguous() for k, v in model.state_dict().items()
    }
    tensors["lm_head.weight"] = random(rng, 3, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_vl", "vision_config": settings}
    write_json(folder / "config.json", config)
    size = {"shortest_edge": 16 * p * p, "longest_edge": 100 * p * p}
    processor = dict(image_processor_type="Qwen2VLImageProcessorFast", size=size)
    processor |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=p)
    write_json(folder / "preprocessor_config.json", processor)
    np.savez_compressed(folder / "expected.npz", **out)


if __name__ == "__main__":
    qwen2(np.random.default_rng(2))
    qwen2_5(np.random.default_rng(3))
    qwen3(np.random.default_rng(4))
