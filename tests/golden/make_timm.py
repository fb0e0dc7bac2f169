"""Makes the golden files of NaFlexViT, by timm's own class.

pip install torch timm safetensors && python tests/golden/make_timm.py
"""

import numpy as np
import timm
import torch
from encoders import fresh, random, randomize
from timm.models import save_for_hf

GRIDS = [(1, 3), (6, 10), (4, 13), (11, 5), (5, 5), (2, 17), (9, 9)]
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
    out = {"grids": np.array(GRIDS, np.int32)}
    for i, grid in enumerate(GRIDS):
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


if __name__ == "__main__":
    for i, (name, (architecture, options)) in enumerate(TIMM.items()):
        naflexvit(name, architecture, options, np.random.default_rng(10 + i))
