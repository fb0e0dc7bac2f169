"""What the makers of other encoders' golden files share.

Each folder holds a release's files, with random weights, norms and biases too, and
`expected.npz`: for image i of grid `grids[i]` its float patches in navit's order
(`patches_i`), its tokens row by row (`tokens_i`), and, where the tower has them, what a
language model gets (`merged_i`), the pooled vector and class logits (`pooled_i`,
`logits_i`). Qwen2-VL and Qwen2.5-VL also have each patch's position, cosines, sines
and window (`positions_i`, `cos_i`, `sin_i`, `windows_i`), and a clip of frame pairs
with its merged tokens (`clip`, `clip_merged`). `image`, `image_tokens` and
`image_merged` are of one picture in the processor's pixels.
"""

import json
import pathlib
import shutil

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
GRIDS = [(2, 2), (6, 10), (4, 14), (10, 6), (2, 18), (8, 8)]


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
