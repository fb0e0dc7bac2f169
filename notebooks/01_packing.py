# %% [markdown]
# # Packing images of any size
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/01_packing.ipynb)
#
# Photographs come in all shapes, and a compiled program wants one. This notebook shows
# how navit brings the two together: an image becomes a grid of patches, grids lie side
# by side in rows of fixed length, and a mask keeps the images of a row apart. You will
# see what this saves, and what it does for a receipt, a chart and a page.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. Everything here is arithmetic and one small tower, so a T4 or a TPU changes
# nothing.

# %%
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    clone = "git clone -q --depth 1 https://github.com/OWNER/navit"
    subprocess.run(f"{clone} && pip install -q ./navit", shell=True, check=True)
    os.chdir("navit")
else:
    here = Path.cwd()
    os.chdir(next(p for p in [here, *here.parents] if (p / "data/sample").exists()))

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from PIL import Image

import navit

# %% [markdown]
# ## From a photograph to a grid
#
# A model with 16-pixel patches sees an image as a grid of patches; each patch is one
# token. `navit.grid_for` returns the largest grid that keeps the aspect ratio and has
# no more tokens than the budget.

# %%
files = sorted(
    p for p in Path("data/sample").glob("*") if p.suffix not in (".md", ".csv")
)
sizes = [Image.open(file).size[::-1] for file in files]
print(f"{'photograph':20}{'height × width':>15}{'256 tokens':>12}{'1024 tokens':>13}")
for file, (height, width) in zip(files, sizes, strict=True):
    small = navit.grid_for(height, width, max_tokens=256)
    large = navit.grid_for(height, width, max_tokens=1024)
    print(
        f"{file.stem:20}{f'{height} × {width}':>15}"
        f"{'{} × {}'.format(*small):>12}{'{} × {}'.format(*large):>13}"
    )

# %% [markdown]
# A tall image gets a tall grid and a wide image a wide one. No image is squeezed into a
# square and none is padded. Here are three of them as the model sees them with 256
# tokens:

# %%
PATCH = 16


def picture(patches):
    """Patches `[rows, columns, 16 * 16 * 3]` as one picture."""
    rows, columns, _ = patches.shape
    pixels = patches.reshape(rows, columns, PATCH, PATCH, 3).swapaxes(1, 2)
    return pixels.reshape(rows * PATCH, columns * PATCH, 3)


chosen = [file for file in files if file.stem in ("brick_wide", "cat", "gravel_tall")]
packed, index = navit.pack(chosen, max_tokens=256, return_index=True)
grids = navit.unpack(packed.patches, packed, index)
widths = [grid.shape[1] / grid.shape[0] for grid in grids]
figure, axes = plt.subplots(
    1, 3, figsize=(9, 2.4), layout="constrained", width_ratios=widths
)
for ax, grid, file in zip(axes, grids, chosen, strict=True):
    rows, columns, _ = grid.shape
    ax.imshow(picture(grid))
    ax.set_xticks(np.arange(0, columns + 1) * PATCH - 0.5, [])
    ax.set_yticks(np.arange(0, rows + 1) * PATCH - 0.5, [])
    ax.grid(color="white", linewidth=0.4)
    ax.tick_params(length=0)
    ax.set_title(f"{file.stem}\n{rows} × {columns} = {rows * columns}", size=8)
plt.show()

# %% [markdown]
# ## From grids to rows
#
# `navit.pack` lays the grids into rows of a fixed length. `max_upscale=1` keeps small
# images small, so lengths differ a lot, which is what packing is good for.

# %%
ROW = 1024
packed, index = navit.pack(
    files, max_tokens=256, row_tokens=ROW, max_upscale=1, return_index=True
)
for name, array in packed._asdict().items():
    print(f"{name:12} {array.shape!s:16} {array.dtype}")

colours = ListedColormap(["white", *plt.get_cmap("tab20").colors])
shown = np.zeros_like(packed.segment_ids)
figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
for row, slot in np.argwhere(index >= 0):
    mine = packed.segment_ids[row] == slot + 1
    shown[row, mine] = index[row, slot] + 1
    name = files[index[row, slot]].stem.replace("_", "\n")
    ax.text(
        np.flatnonzero(mine).mean(),
        row,
        name,
        ha="center",
        va="center",
        size=7,
        rotation=90 if mine.sum() < 60 else 0,
    )
ax.imshow(shown, cmap=colours, vmin=0, vmax=20, aspect="auto", interpolation="nearest")
ax.set_yticks(range(len(shown)), [f"row {row}" for row in range(len(shown))])
ax.set_xlabel(f"token of {ROW}; white is padding")
plt.show()

# %% [markdown]
# A batch is four arrays. `segment_ids` numbers the images of a row (0 is padding),
# `coords` is the place of each patch in its own image, and `grids` lists the images.
#
# How much work does this save? Without packing, each image has a row of its own, padded
# to the budget.

# %%
tokens = int((packed.segment_ids > 0).sum())
alone = len(files) * 256
print(f"{len(files)} photographs have {tokens:,} tokens")
print(f"one image a row: {alone:,} places, {tokens / alone:.1%} of them used")
print(f"packed: {shown.size:,} places, {tokens / shown.size:.1%} of them used")

# %% [markdown]
# Seventeen images make few rows, and the last is seldom full. Over a whole dataset the
# padding falls to a few percent or less. `navit plan CONFIG` shows it for your data.
#
# ## Images do not see each other
#
# Attention works within one row, so a mask must keep the images of a row apart: token
# *i* sees token *j* only if both have the same segment id. The mask has one square
# block per image. navit never lets anything cross it. To see this, blacken one
# photograph and compare the others, bit by bit:

# %%
from navit.config import VisionConfig
from navit.model.vision import Vision

tower = Vision(VisionConfig(width=64, depth=2, mlp_dim=128, num_heads=2))
before = np.asarray(tower(packed).pooled)
patches = packed.patches.copy()
patches[0, packed.segment_ids[0] == 1] = 0
after = np.asarray(tower(packed._replace(patches=patches)).pooled)
changed = (before != after).any(-1)
print("slots whose vector changed:", np.argwhere(changed).tolist())
assert np.argwhere(changed).tolist() == [[0, 0]]

# %% [markdown]
# ## The mask of four images
#
# Take four square images of 256, 576, 729 and 1024 tokens in one row of 2585. The mask
# has 2585 × 2585 entries, of which 1,977,329 are ones: 29.6 %.

# %%
lengths = np.array([256, 576, 729, 1024])
segment_ids = np.repeat([1, 2, 3, 4], lengths)
mask = segment_ids[:, None] == segment_ids[None, :]
assert mask.shape == (2585, 2585)
assert mask.sum() == (lengths**2).sum() == 1_977_329
print(f"{mask.sum():,} of {mask.size:,} entries are ones: {mask.mean():.1%}")

# %% [markdown]
# The rest of the entries is work that a plain attention would do and throw away. The
# implementations that navit chooses skip it wholly or in part: on a CPU each image is
# gathered into a row of its own, and on a TPU a kernel skips blocks in long rows.
#
# NaViT also **drops tokens** in training. Half of them leaves 1,292. A random half
# takes about half of every image, so the share of ones stays where it was, and the
# number of ones falls to a quarter. Draw it 200 times:

# %%
rng = np.random.default_rng(0)
kept = len(segment_ids) // 2
ones = []
for _ in range(200):
    ids = np.sort(rng.choice(segment_ids, kept, replace=False))
    ones.append((np.bincount(ids) ** 2).sum())
ones = np.array(ones)
halved = (lengths // 2) ** 2
print(f"{kept:,} tokens kept, in {len(ones)} draws:")
print(
    f"share of ones: {ones.min() / kept**2:.1%} to {ones.max() / kept**2:.1%}, "
    f"mean {ones.mean() / kept**2:.1%}"
)
print(f"ones left: {ones.mean() / mask.sum():.1%} of those without dropping")
print(f"with exactly half of each image: {halved.sum() / kept**2:.1%}")
assert kept == 1292 and abs(ones.mean() / mask.sum() - 0.25) < 0.002

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for ax, segments in ((left, segment_ids), (right, ids)):
    same = segments[:, None] == segments[None, :]
    image = same * segments
    ax.imshow(
        image[::4, ::4],
        cmap=ListedColormap(["#eeeeee", *plt.get_cmap("tab10").colors[:4]]),
        extent=(0, len(segments), len(segments), 0),
        interpolation="nearest",
    )
    ax.set_title(f"{len(segments):,} tokens, {same.sum():,} ones", size=9)
    ax.set_xlabel("token that is seen")
left.set_ylabel("token that looks")
for ax in (left, right):
    ax.set(xlim=(0, 2585), ylim=(2585, 0))
plt.show()

# %% [markdown]
# Both pictures have the same scale: the same row with half of its tokens needs a
# quarter of the attention.
#
# ## A receipt, a chart and a page
#
# Documents are hard: they are large, seldom square, and their text is small. There are
# three ways to bring them to a model, here with the sizes of CLIP's ViT-L/14 at 336
# pixels, 576 tokens:
#
# * **square**: resize to 336 × 336;
# * **tiles**: lay out at most four squares of 336 pixels, so that most pixels of the
#   image remain, and add an overview of the whole (LLaVA-NeXT);
# * **native**: keep the image as it is, and round its sides up to whole patches.
#
# `navit.strategies` has the first two, and eleven more, as functions of an image's
# size. Each returns views; a view is encoded by itself, so the mask has one block per
# view.

# %%
from navit import strategies

PATCH_14 = 14
documents = {"receipt": (1500, 600), "chart": (896, 1792), "page": (2200, 1700)}


def views_of(way, height, width):
    """The tokens of each view, and the size at which the image is shown."""
    if way == "native":
        tokens = math.ceil(height / PATCH_14) * math.ceil(width / PATCH_14)
        return [tokens], (height, width)
    strategy = strategies.Square(336) if way == "square" else strategies.AnyRes(336)
    views = strategy.views(height, width)
    return [math.prod(view.grid) for view in views], views[-1].size


print(
    f"{'':8}{'width × height':>15}{'way':>8}{'views':>6}{'tokens':>8}"
    f"{'pixels shown':>13}{'bent':>6}{'ones of the mask':>18}"
)
counts = {}
for name, (height, width) in documents.items():
    for way in ("square", "tiles", "native"):
        views, (rows, columns) = views_of(way, height, width)
        counts[name, way] = sum(views)
        bent = (columns / width) / (rows / height)
        print(
            f"{name:8}{f'{width} × {height}':>15}{way:>8}{len(views):6}{sum(views):8,}"
            f"{rows * columns / (height * width):13.1%}{max(bent, 1 / bent):5.1f}×"
            f"{sum(v**2 for v in views):18,}"
        )
assert counts["receipt", "native"] == 43 * 108 == 4644
assert [counts["chart", w] for w in ("square", "tiles", "native")] == [576, 1728, 8192]
assert counts["page", "tiles"] == 2880

# %% [markdown]
# The square is cheap and shows the receipt two and a half times too wide. Tiles keep
# the aspect ratio and a small mask, but little of a large page remains, a border may
# cut a word, and no tile sees another. Native shows all pixels, at a price that grows
# with the square of the tokens.
#
# A token budget lies between them: the aspect ratio of native, and the cost that you
# choose. With 16-pixel patches, as in SigLIP 2's NaFlex models and in navit:

# %%
LETTER = (
    10 / 72 * 200
)  # pixels of 10-point type on a page of 8.5 × 11 inches at 200 dpi
print(f"{'':10}{'budget':>8}{'grid':>10}{'tokens':>8}{'scale':>8}{'10-point type':>16}")
for name, (height, width) in documents.items():
    for budget in (256, 729, 1024, 4096):
        rows, columns = navit.grid_for(height, width, max_tokens=budget)
        scale = rows * 16 / height
        size = f"{LETTER * scale:.1f} pixels" if name == "page" else ""
        print(
            f"{name:10}{budget:8,}{f'{rows} × {columns}':>10}{rows * columns:8,}"
            f"{scale:8.1%}{size:>16}"
        )
assert navit.grid_for(2200, 1700, max_tokens=256) == (18, 14)

# %% [markdown]
# With 256 tokens, a page is 288 pixels high and its 10-point type has under 4 pixels:
# nobody can read that, and no model can. With 1024 tokens it has about 7, which is just
# readable; for small print, give the page more. The checkpoint is the same: notebook
# [02](02_one_checkpoint_any_budget.ipynb) shows one at several budgets.
