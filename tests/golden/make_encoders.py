"""Makes the golden files of other native-resolution encoders, with random weights.

  pip install torch transformers timm safetensors && \\
      python tests/golden/make_encoders.py

Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Pixtral are transformers' classes, NaFlexViT is
timm's. MoonViT and Ovis2.5, which neither has, are restated here from their published
layouts (arXiv 2504.07491 and moonshotai/MoonViT-SO-400M; AIDC-AI/Ovis2.5). Every norm
and bias is random too.

Each folder holds a release's files, and `expected.npz`: for image i of grid `grids[i]`
its float patches in navit's order (`patches_i`), its tokens row by row (`tokens_i`),
and, where the tower has them, what a language model gets (`merged_i`), the pooled
vector and class logits (`pooled_i`, `logits_i`). Qwen2-VL and Qwen2.5-VL also have
each patch's position, cosines, sines and window (`positions_i`, `cos_i`, `sin_i`,
`windows_i`), and a clip of frame pairs with its merged tokens (`clip`, `clip_merged`).
`image`, `image_tokens` and `image_merged` are of one picture in the processor's pixels.

`rotary.npz` has `positions` (row, column), and for each released head width the float32
angles there, their cosines and sines: one for each pair of channels.
"""

import json
import pathlib
import shutil

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import PixtralVisionConfig, PixtralVisionModel, Qwen2VLImageProcessor
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLVisionRotaryEmbedding,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionModel,
    Qwen3VLVisionRotaryEmbedding,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

HERE = pathlib.Path(__file__).parent
GRIDS = [(2, 2), (6, 10), (4, 14), (10, 6), (2, 18), (8, 8)]
TIMM_GRIDS = [(1, 3), (6, 10), (4, 13), (11, 5), (5, 5), (2, 17), (9, 9)]
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def fresh(name):
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    return HERE / name


def random(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def randomize(model, rng):
    """Makes every parameter random; scales of norms and layers are around 1."""
    for name, p in model.named_parameters():
        norm = any(part in name for part in ("norm", "ln_q", "gamma"))
        one = 1.0 if norm and name.endswith(("weight", "gamma")) else 0.0
        p.data = one + (0.15 if p.ndim > 1 else 0.3) * random(rng, *p.shape)
    return model.eval()


def write_json(file, data):
    file.write_text(json.dumps(data, indent=2) + "\n")


def blocks(grid):
    """For each token in 2x2 order, its place row by row."""
    rows, columns = grid
    index = torch.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
    return index.transpose(1, 2).flatten()


def in_rows(values, order):
    out = torch.empty_like(values)
    out[order] = values
    return out.numpy()


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


def moonvit(rng):
    """Kimi-VL's tower and projector: the layout of its files, and plain torch."""
    folder, d, depth, heads, mlp, p, side, to = fresh("kimi_vl"), 24, 2, 2, 40, 4, 7, 20
    shapes = {
        "patch_embed.proj.weight": (d, 3, p, p),
        "patch_embed.proj.bias": (d,),
        "patch_embed.pos_emb.weight": (side, side, d),
        "encoder.final_layernorm.weight": (d,),
        "encoder.final_layernorm.bias": (d,),
    }
    for i in range(depth):
        for layer, shape in {
            "norm0": (d,),
            "norm1": (d,),
            "wqkv": (3 * d, d),
            "wo": (d, d),
            "mlp.fc0": (mlp, d),
            "mlp.fc1": (d, mlp),
        }.items():
            shapes[f"encoder.blocks.{i}.{layer}.weight"] = shape
            shapes[f"encoder.blocks.{i}.{layer}.bias"] = shape[:1]
    shapes = {f"vision_tower.{k}": v for k, v in shapes.items()}
    for layer, shape in {
        "pre_norm": (d,),
        "linear_1": (4 * d, 4 * d),
        "linear_2": (to, 4 * d),
    }.items():
        shapes[f"multi_modal_projector.{layer}.weight"] = shape
        shapes[f"multi_modal_projector.{layer}.bias"] = shape[:1]
    w = {}
    for name, shape in shapes.items():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        w[name] = one + (0.15 if len(shape) > 1 else 0.3) * random(rng, *shape)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def turned(x, grid):
        """Turns channels (4i, 4i+1) by the column, and (4i+2, 4i+3) by the row."""
        k = d // heads
        row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        frequency = 1.0 / (10000.0 ** (torch.arange(0, k, 4).float() / k))
        angle = torch.stack(
            [
                column.flatten()[:, None] * frequency,
                row.flatten()[:, None] * frequency,
            ],
            -1,
        ).flatten(1)  # [n, k/2], by pairs
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(z).flatten(-2)

    def encode(pixels, grid):
        """`[n, 3, p, p]` -> tokens and merged tokens."""
        tower = "vision_tower"
        x = F.conv2d(
            pixels,
            w[f"{tower}.patch_embed.proj.weight"],
            w[f"{tower}.patch_embed.proj.bias"],
        ).flatten(1)
        table = w[f"{tower}.patch_embed.pos_emb.weight"]
        if grid != (side, side):
            table = F.interpolate(
                table.permute(2, 0, 1)[None], size=grid, mode="bicubic"
            )[0].permute(1, 2, 0)
        x = x + table.reshape(-1, d)
        for i in range(depth):
            block = f"{tower}.encoder.blocks.{i}"
            qkv = linear(norm(x, f"{block}.norm0"), f"{block}.wqkv")
            q, k, v = qkv.reshape(len(x), 3, heads, -1).unbind(1)
            q, k = turned(q, grid), turned(k, grid)
            logits = torch.einsum("qhk,nhk->hqn", q, k) * (d // heads) ** -0.5
            mixed = torch.einsum("hqn,nhk->qhk", logits.softmax(-1), v)
            x = x + linear(mixed.flatten(1), f"{block}.wo")
            y = linear(norm(x, f"{block}.norm1"), f"{block}.mlp.fc0")
            x = x + linear(F.gelu(y, approximate="tanh"), f"{block}.mlp.fc1")
        x = norm(x, f"{tower}.encoder.final_layernorm")
        y = norm(x, "multi_modal_projector.pre_norm")[blocks(grid)].reshape(-1, 4 * d)
        y = linear(F.gelu(linear(y, "multi_modal_projector.linear_1")), LAST)
        return x.numpy(), y.reshape(grid[0] // 2, grid[1] // 2, -1).numpy()

    LAST = "multi_modal_projector.linear_2"
    grids = [*GRIDS, (14, 2)]
    out = {"grids": np.array(grids, np.int32)}
    for i, grid in enumerate(grids):
        patches = random(rng, grid[0] * grid[1], p, p, 3)
        out[f"patches_{i}"] = patches.flatten(1).numpy()
        out[f"tokens_{i}"], out[f"merged_{i}"] = encode(
            patches.permute(0, 3, 1, 2), grid
        )
    # 21x37 pixels are padded with black to 24x40, of which each 4x4 is a patch.
    image = rng.integers(0, 256, (21, 37, 3)).astype(np.uint8)
    padded = np.zeros((24, 40, 3), np.uint8)
    padded[:21, :37] = image
    pixels = torch.from_numpy(padded.astype(np.float32) / 255)
    pixels = ((pixels - 0.5) / 0.5).reshape(6, p, 10, p, 3).permute(0, 2, 4, 1, 3)
    out["image"] = image
    out["image_tokens"], out["image_merged"] = encode(pixels.flatten(0, 1), (6, 10))
    w["language_model.lm_head.weight"] = random(rng, 3, 5)
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    vision = dict(
        model_type="moonvit",
        patch_size=p,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        hidden_size=d,
        intermediate_size=mlp,
        init_pos_emb_height=side,
        init_pos_emb_width=side,
        merge_kernel_size=[2, 2],
    )
    write_json(
        folder / "config.json", {"model_type": "kimi_vl", "vision_config": vision}
    )
    processor = dict(image_processor_type="KimiVLImageProcessor", patch_size=p)
    processor |= dict(in_token_limit=100, pad_input=True, merge_kernel_size=[2, 2])
    processor |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, num_pooled_tokens=1024)
    write_json(folder / "preprocessor_config.json", processor)
    np.savez_compressed(folder / "expected.npz", **out)


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


def pixtral(rng):
    """transformers' tower, and LLaVA's projector, which Pixtral 12B has."""
    folder, p, d, to = fresh("pixtral"), 4, 24, 20
    settings = dict(
        hidden_size=d,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=p,
        image_size=64,
        hidden_act="silu",
    )
    model = randomize(PixtralVisionModel(PixtralVisionConfig(**settings)), rng)
    for name, x in model.named_parameters():
        if "ln_pre" in name:
            x.data = 1 + 0.3 * random(rng, *x.shape)
    projector = torch.nn.Sequential(
        torch.nn.Linear(d, to), torch.nn.GELU(), torch.nn.Linear(to, to)
    )
    randomize(projector, rng)
    grids = [(1, 3), (6, 10), (4, 13), (11, 5), (5, 5), (16, 16)]
    out = {"grids": np.array(grids, np.int32)}
    for i, grid in enumerate(grids):
        patches = random(rng, *grid, p, p, 3)
        pixels = patches.permute(4, 0, 2, 1, 3).reshape(1, 3, grid[0] * p, grid[1] * p)
        with torch.no_grad():
            found = model(pixels).last_hidden_state[0]
            merged = projector(found).reshape(*grid, -1)
        out[f"patches_{i}"] = patches.reshape(grid[0] * grid[1], -1).numpy()
        out[f"tokens_{i}"], out[f"merged_{i}"] = found.numpy(), merged.numpy()
    tensors = {f"vision_tower.{k}": v for k, v in model.state_dict().items()}
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        for part in ("weight", "bias"):
            value = projector.state_dict()[f"{ours}.{part}"]
            tensors[f"multi_modal_projector.{theirs}.{part}"] = value
    tensors["language_model.lm_head.weight"] = random(rng, 3, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vision = {"model_type": "pixtral", **settings, "hidden_act": "gelu"}  # as released
    config = {"model_type": "llava", "vision_config": vision}
    write_json(folder / "config.json", config)
    np.savez_compressed(folder / "expected.npz", **out)


def ovis(rng):
    """Ovis2.5's tower, restated: the names of its files, and plain torch."""
    folder, d, depth, heads, mlp, p, side = fresh("ovis2_5"), 24, 2, 2, 40, 4, 5
    tower = "visual_tokenizer.vit.vision_model"
    shapes = {
        "embeddings.patch_embedding.weight": (d, 3, p, p),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": (side * side, d),
        "post_layernorm.weight": (d,),
        "post_layernorm.bias": (d,),
    }
    for i in range(depth):
        layers = dict.fromkeys(("layer_norm1", "layer_norm2"), (d,))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layers[f"self_attn.{name}"] = (d, d)
        layers |= {"mlp.fc1": (mlp, d), "mlp.fc2": (d, mlp)}
        for layer, shape in layers.items():
            shapes[f"encoder.layers.{i}.{layer}.weight"] = shape
            shapes[f"encoder.layers.{i}.{layer}.bias"] = shape[:1]
    w = {}
    for name, shape in shapes.items():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        w[f"{tower}.{name}"] = one + (0.15 if len(shape) > 1 else 0.3) * random(
            rng, *shape
        )

    def layer(x, name):
        weight, bias = w[f"{tower}.{name}.weight"], w[f"{tower}.{name}.bias"]
        if "norm" in name:
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
        return F.linear(x, weight, bias)

    def turned(x, grid):
        """Turns channel j with j + k/2: the first pairs by the row."""
        k = d // heads
        row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        frequency = 1.0 / (10000.0 ** (torch.arange(0, k, 4).float() / k))
        angle = torch.cat(
            [row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], -1
        )
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : k // 2], x[..., k // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    out = {"grids": np.array(GRIDS, np.int32)}
    for n, grid in enumerate(GRIDS):
        patches = random(rng, grid[0] * grid[1], p, p, 3)
        name = f"{tower}.embeddings.patch_embedding"
        pixels = patches.permute(0, 3, 1, 2)
        x = F.conv2d(pixels, w[f"{name}.weight"], w[f"{name}.bias"]).flatten(1)
        table = w[f"{tower}.embeddings.position_embedding.weight"]
        table = table.reshape(1, side, side, d).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic")[0]
        x = x + table.flatten(1).T
        for i in range(depth):
            block = f"encoder.layers.{i}"
            y = layer(x, f"{block}.layer_norm1")
            q, k, v = (
                layer(y, f"{block}.self_attn.{part}_proj").reshape(len(x), heads, -1)
                for part in "qkv"
            )
            q, k = turned(q, grid), turned(k, grid)
            logits = torch.einsum("qhk,nhk->hqn", q, k) * (d // heads) ** -0.5
            mixed = torch.einsum("hqn,nhk->qhk", logits.softmax(-1), v)
            x = x + layer(mixed.flatten(1), f"{block}.self_attn.out_proj")
            y = layer(layer(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
            x = x + layer(F.gelu(y, approximate="tanh"), f"{block}.mlp.fc2")
        out[f"patches_{n}"], out[f"tokens_{n}"] = patches.flatten(1).numpy(), x.numpy()
        out[f"pooled_{n}"] = layer(x.mean(0), "post_layernorm").numpy()
    w["visual_tokenizer.head.0.weight"] = random(rng, 7, 4 * d)
    w["llm.lm_head.weight"] = random(rng, 3, 5)
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    vit = dict(num_attention_heads=heads, hidden_stride=2, patch_size=p, num_patches=-1)
    vit |= dict(hidden_act="gelu_pytorch_tanh", fullatt_block_indexes=None)
    vit |= dict(preserve_original_pe=True, use_rope=True, image_size=p * side)
    write_json(folder / "config.json", {"model_type": "ovis2_5", "vit_config": vit})
    np.savez_compressed(folder / "expected.npz", **out)


TIMM = {
    "timm_gap": ("naflexvit_base_patch16_gap", dict(num_classes=7)),
    "timm_par": ("naflexvit_base_patch16_par_gap", dict(num_classes=0)),
    "timm_parfac": ("naflexvit_base_patch16_parfac_gap", dict(num_classes=5)),
    "timm_siglip": ("naflexvit_base_patch16_siglip", dict(num_classes=0)),
}


def naflexvit(name, architecture, options, rng):
    folder, p = fresh(name), 4
    model = timm.create_model(
        architecture,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=1.5,
        patch_size=p,
        pos_embed_grid_size=(5, 5),
        **options,
    )
    randomize(model, rng)
    out = {"grids": np.array(TIMM_GRIDS, np.int32)}
    for i, grid in enumerate(TIMM_GRIDS):
        n = grid[0] * grid[1]
        patches = random(rng, 1, n, p * p * 3)
        coords = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        inputs = dict(
            patches=patches,
            patch_coord=coords.flatten(1).T[None],
            patch_valid=torch.ones(1, n, dtype=torch.bool),
        )
        with torch.no_grad():
            tokens = model.forward_features(**inputs)["patches"]
            head = dict(patches=tokens, patch_valid=inputs["patch_valid"])
            out[f"pooled_{i}"] = model.forward_head(**head, pre_logits=True)[0].numpy()
            out[f"logits_{i}"] = model.forward_head(**head)[0].numpy()
        out[f"patches_{i}"] = patches[0].numpy()
        out[f"tokens_{i}"] = tokens[0, model.num_prefix_tokens :].numpy()
    save_for_hf(model, folder, safe_serialization=True)
    np.savez_compressed(folder / "expected.npz", **out)


def rotary():
    """Angles, cosines and sines by transformers' own modules, at released sizes."""
    places = np.random.default_rng(0).integers(0, 512, (12, 2))
    places = torch.from_numpy(np.concatenate([[[0, 0], [1, 0], [0, 1]], places]))
    out = {"positions": places.numpy().astype(np.int32)}
    for name, Module, config in (
        ("qwen_80", Qwen2VLVisionRotaryEmbedding, Qwen2VLVisionConfig()),
        ("qwen_72", Qwen3VLVisionRotaryEmbedding, Qwen3VLVisionConfig()),
        ("pixtral_64", PixtralVisionRotaryEmbedding, PixtralVisionConfig()),
        (
            "pixtral_88",
            PixtralVisionRotaryEmbedding,
            PixtralVisionConfig(hidden_size=1408),
        ),
    ):
        module = Module(config)
        angles = places[..., None].float() * module.inv_freq
        angles = module.recomposition_frequencies(angles)
        cos, sin = module(torch.zeros(1), places)
        assert (cos == angles.cos()).all() and (sin == angles.sin()).all()
        for part, value in (("angles", angles), ("cos", cos), ("sin", sin)):
            out[f"{name}_{part}"] = value.chunk(2, -1)[0].numpy()
    np.savez_compressed(HERE / "rotary.npz", **out)


if __name__ == "__main__":
    rotary()
    moonvit(np.random.default_rng(1))
    qwen2(np.random.default_rng(2))
    qwen2_5(np.random.default_rng(3))
    qwen3(np.random.default_rng(4))
    pixtral(np.random.default_rng(5))
    ovis(np.random.default_rng(6))
    for i, (name, (architecture, options)) in enumerate(TIMM.items()):
        naflexvit(name, architecture, options, np.random.default_rng(10 + i))
