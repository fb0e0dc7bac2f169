"""Makes the golden files of MoonViT, Pixtral and Ovis2.5.

  pip install torch transformers safetensors && python tests/golden/make_encoders.py

Pixtral is transformers' class. MoonViT and Ovis2.5 are restated here in PyTorch, from
their published layouts: arXiv 2504.07491 with the names and shapes of
moonshotai/MoonViT-SO-400M, and AIDC-AI/Ovis2.5.
"""

import numpy as np
import torch
import torch.nn.functional as F
from encoders import GRIDS, blocks, fresh, random, randomize, write_json
from safetensors.torch import save_file
from transformers import PixtralVisionConfig, PixtralVisionModel


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


if __name__ == "__main__":
    moonvit(np.random.default_rng(1))
    pixtral(np.random.default_rng(5))
    ovis(np.random.default_rng(6))
