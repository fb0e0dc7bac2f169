# %% [markdown]
# # Resolution strategies
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/08_resolution_strategies.ipynb)
#
# A vision-language model must turn an image of any size into encoder inputs (*views*)
# and tokens. Some squash it into a square, some cut it into tiles, some keep it whole.
# This notebook puts the published rules side by side on a receipt and a chart, counts
# what each costs and loses, finds where tiles cut objects, and chooses a strategy for
# a workload and a budget.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. Everything here is arithmetic, so a T4 or a TPU changes nothing.

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
from PIL import Image
from scipy import ndimage

import navit
from navit import strategies
from navit.model import variants
from navit.plan.strategies.measures import cuts_of, measure

TOWER = variants.vision("L/14")  # its operations are counted


def show(height, width, **chosen):
    """A line for each strategy."""
    found = {name: measure(s, height, width, tower=TOWER) for name, s in chosen.items()}
    print(f"{width} x {height} (width x height)")
    print(f"{'':12}  views  patches  tokens  TFLOPs  scale   kept  distortion")
    for name, m in found.items():
        print(
            f"{name:12}  {len(m.views):5}  {m.encoder_tokens:7,}  {m.tokens:6,}  "
            f"{m.flops / 1e12:6.2f}  {m.scale:5.2f}  {m.kept:5.1%}  {m.distortion:9.2f}"
        )
    return found


# %% [markdown]
# ## 1. A receipt
#
# A receipt of 600 × 1500 pixels and patches of 14. How many patches is it? If the rest
# is cut off, 42 × 107 = 4,494; if it is padded, 43 × 108 = 4,644. Qwen2-VL rounds each
# side to a multiple of 28 instead, and merges 2 × 2 patches to a token: 4,536 patches,
# 1,134 tokens, and two tags.

# %%
HEIGHT, WIDTH, PATCH = 1500, 600, 14
floor = (HEIGHT // PATCH) * (WIDTH // PATCH)
ceil = math.ceil(HEIGHT / PATCH) * math.ceil(WIDTH / PATCH)
qwen = strategies.QwenVL()
(view,) = qwen.views(HEIGHT, WIDTH)
print(f"cut off {floor:,}, padded {ceil:,}, Qwen {math.prod(view.grid):,}")
assert (floor, ceil, math.prod(view.grid)) == (4494, 4644, 4536)
assert qwen.tokens(HEIGHT, WIDTH) == 4536 // 4 + 2

receipt = show(HEIGHT, WIDTH, square=strategies.Square(336), qwen=qwen)
assert abs(receipt["square"].kept - 0.125) < 0.001
assert receipt["square"].distortion == 2.5
assert receipt["square"].tokens == 576

# %% [markdown]
# A square of 336 pixels has half of Qwen's tokens, but it keeps 12.5 % of the pixels
# and shows the receipt 2.5 times too wide. It loses far more than the tokens suggest.
#
# ## 2. What a row of images costs
#
# Square images of 256, 576, 729 and 1024 tokens lie in one row. Each attends only to
# itself. Which share of the attention matrix is that?

# %%
lengths = np.array([256, 576, 729, 1024])
ones, entries = (lengths**2).sum(), lengths.sum() ** 2
print(f"{lengths.sum():,} tokens: {ones:,} of {entries:,} = {ones / entries:.2%}")
assert (ones, entries) == (1_977_329, 6_682_225)

# %% [markdown]
# Tiles are packed in the same way: every view is a segment of its own. So a tiled image
# has a smaller attention matrix than the same patches in one view. The receipt again,
# as InternVL's tiles:

# %%
tiled = strategies.InternVL(max_tiles=12)
views = [math.prod(view.grid) for view in tiled.views(HEIGHT, WIDTH)]
share = sum(n * n for n in views) / sum(views) ** 2
print(f"{len(views)} views, {sum(views):,} patches: {share:.1%} of the matrix")
image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
packed = navit.pack([image], patch_size=14, strategy=tiled)
assert (packed.segment_ids > 0).sum() == sum(views)

# %% [markdown]
# ## 3. A chart in three ways
#
# A chart of 1792 × 896 pixels: (a) as one square, (b) as LLaVA-NeXT's tiles and a
# thumbnail, (c) whole, every pixel of it. Which has the fewest tokens, and which the
# most detail?

# %%
chart = show(
    896,
    1792,
    square=strategies.Square(336),
    tiles=strategies.AnyRes(),
    whole=strategies.QwenVL(max_pixels=1792 * 896),
    qwen=strategies.QwenVL(),
)
assert chart["square"].tokens == 576 and round(chart["square"].kept, 2) == 0.07
assert chart["tiles"].encoder_tokens == 1728 and chart["tiles"].tokens == 1752
assert chart["whole"].encoder_tokens == 8192 and chart["whole"].tokens == 2048 + 2
assert chart["qwen"].encoder_tokens == 5000 and round(chart["qwen"].kept, 2) == 0.61
for m, tera in zip(chart.values(), (0.38, 1.14, 11.5), strict=False):
    assert abs(m.flops / 1e12 - tera) < 0.06

# %% [markdown]
# (a) has the fewest tokens and (c) the most detail, for 30 times the operations. (b)
# has three views of 576 patches; 24 newline tokens make it 1,752. Qwen's default bound
# of 1280 tokens shrinks the chart to 61 % of its pixels.
#
# ## 4. Half of the tokens
#
# In training, half of the tokens may be dropped. Of the row above 1,292 remain. Exactly
# half of each image leaves the share of ones where it was; random halves vary.

# %%
halved = lengths // 2
kept = lengths.sum() // 2
rng = np.random.default_rng(0)
ids = np.repeat(np.arange(4), lengths)
shares = [
    (np.bincount(rng.choice(ids, kept, replace=False)) ** 2).sum() / kept**2
    for _ in range(200)
]
print(f"{kept:,} kept, halved by image: {(halved**2).sum() / halved.sum() ** 2:.2%}")
print(f"200 draws: {min(shares):.1%} to {max(shares):.1%}, mean {np.mean(shares):.2%}")
left = np.mean(shares) * kept**2 / ones
print(f"entries that remain: {left:.1%}")
assert kept == 1292 and abs(left - 0.25) < 0.003

# %% [markdown]
# ## 5. What the bounds are for
#
# Qwen has a least and a most number of pixels. The least gives small images enough
# tokens; the most bounds the length, and with it the quadratic cost. Squares from 14 to
# 2800 pixels, with both bounds and with neither:

# %%
sides = np.unique(np.geomspace(14, 2800, 120).astype(int))
bounded = strategies.QwenVL(min_pixels=28 * 28 * 64)
free = strategies.QwenVL(min_pixels=1, max_pixels=10**9, qwen_vl_utils=True)
figure, (left_ax, right_ax) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for name, strategy in (("free", free), ("64 to 1280 tokens", bounded)):
    found = [measure(strategy, int(x), int(x), tower=TOWER) for x in sides]
    left_ax.loglog(sides, [m.tokens - 2 for m in found], label=name)
    right_ax.loglog(sides, [m.flops / 1e12 for m in found], label=name)
left_ax.set(xlabel="side of a square image (pixels)", ylabel="tokens")
right_ax.set(xlabel="side of a square image (pixels)", ylabel="TFLOPs, ViT-L")
left_ax.legend()
plt.show()

# %% [markdown]
# The spikes of the floor, 81 tokens in place of 64, belong to the published rule: it
# enlarges a side to 224 pixels, 8 times 28, and rounds up. Where the floating-point
# result is a hair above 224, it becomes 9 times 28.
#
# ## Where tiles cut objects
#
# Tiles keep more pixels than one square, but an object that lies on a cut is in no tile
# as a whole. This photograph has coins, which are easy to find: they are brighter than
# the table.

# %%
with Image.open("data/sample/coins.png") as file:
    coins = np.asarray(file.convert("RGB"))
grey = ndimage.gaussian_filter(coins.mean(-1), 1.5)
bright = grey > ndimage.gaussian_filter(grey, 40) + 8
solid = ndimage.binary_opening(ndimage.binary_fill_holes(bright), iterations=4)
labels, _ = ndimage.label(solid)
boxes = [
    box
    for box in ndimage.find_objects(labels)
    if min(s.stop - s.start for s in box) > 20
]
sizes = np.array([[s.stop - s.start for s in box] for box in boxes])
print(f"{coins.shape[1]} x {coins.shape[0]} pixels, {len(boxes)} coins")


def is_cut(box, rows, columns):
    return any(
        s.start < x < s.stop
        for s, cuts in zip(box, (rows, columns), strict=True)
        for x in cuts
    )


chosen = {
    "QwenVL": strategies.QwenVL(),
    "AnyRes": strategies.AnyRes(),
    "InternVL, 6 tiles": strategies.InternVL(max_tiles=6),
    "InternVL, 12 tiles": strategies.InternVL(),
}
height, width = coins.shape[:2]
figure, grid = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
counts = {}
for ax, (name, strategy) in zip(grid, chosen.items(), strict=True):
    rows, columns = cuts_of(strategy.views(height, width), height, width)
    expected = np.mean(
        [
            measure(
                strategy, height, width, tower=TOWER, object_size=(int(h), int(w))
            ).cut
            for h, w in sizes
        ]
    )
    ax.imshow(coins)
    for y in rows:
        ax.axhline(y, color="deepskyblue", linewidth=1.5)
    for x in columns:
        ax.axvline(x, color="deepskyblue", linewidth=1.5)
    cut = [is_cut(box, rows, columns) for box in boxes]
    for box, hit in zip(boxes, cut, strict=True):
        (y, x), color = box, "red" if hit else "lime"
        size = (x.stop - x.start, y.stop - y.start)
        ax.add_patch(plt.Rectangle((x.start, y.start), *size, fill=False, ec=color))
    ax.set(xticks=[], yticks=[])
    counts[name] = sum(cut)
    ax.set_title(
        f"{name}\n{sum(cut)} of {len(boxes)} cut, expected {expected * len(boxes):.1f}",
        size=10,
    )
plt.show()
assert counts["QwenVL"] == 0 < counts["InternVL, 12 tiles"]

# %% [markdown]
# Blue lines are cuts, and red boxes are coins that a cut divides. *Expected* is the
# mean over coins that could lie anywhere, which is the column *cut* of `navit views`.
# With 6 tiles fewer coins are cut than expected, because the horizontal cut happens to
# lie between two rows of coins. The thumbnail shows the coins whole, but small. More
# tiles mean more detail and more cuts; a single view of the native aspect has none.
#
# ## Which strategy for which budget
#
# `navit budget` chooses a strategy for each kind of request. It begins with the
# cheapest that meets the least scale, and takes the upgrade of most detail per extra
# token until the budget is spent. Here Qwen must serve receipts, charts, photographs
# and video, as one checkpoint does; only its bound of pixels is free.

# %%
command = [sys.executable, "-c", "import navit.cli; navit.cli.main()", "budget"]
done = subprocess.run(
    [*command, "data/workloads/example.csv", "--tokens", "4M", "--strategy", "qwen"],
    capture_output=True,
    text=True,
    check=True,
)
print(done.stdout)
assert "4,000,000" in done.stdout

# %% [markdown]
# The star marks the choice of each kind. Text sets a least scale for receipts and
# charts, so they are expensive from the start; the rest of the budget goes where a
# token adds most detail. Try another budget, or your own table.
