# %% [markdown]
# # One checkpoint, any budget
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/02_one_checkpoint_any_budget.ipynb)
#
# A token budget is the number of patches that one image may have. It is not a property
# of the model: the same weights embed an image with 256, 729 or 1024 tokens. This
# notebook loads a model, embeds images at three budgets, classifies them by text, and
# draws where the pooling head looks at each budget.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. The notebook is made for a CPU. On a T4 or a TPU, the released weights of the
# third cell embed a photograph in milliseconds instead of seconds; nothing else
# changes.

# %%
import os
import shutil
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

# %% [markdown]
# ## A model
#
# `navit.load` opens released SigLIP 2 weights. If you want to see real photographs
# classified, download them once (1.5 GB) and name the folder in `WEIGHTS`:
#
# ```sh
# pip install huggingface_hub
# hf download google/siglip2-base-patch16-naflex --local-dir siglip2-base-patch16-naflex
# ```
#
# With `WEIGHTS = None`, the next cell trains a tiny model for 150 steps on navit's
# drawn dataset, which takes one to two minutes. Each image of that dataset has a large
# figure and, mostly, a few dots, and a caption says their colours. So this model knows
# seven colours of figures and has begun to learn the dots. It knows nothing else: do
# not ask it about photographs.

# %%
WEIGHTS = None  # or "siglip2-base-patch16-naflex"
DRAWN = WEIGHTS is None

if DRAWN:
    WEIGHTS = "runs/notebook_02"
    shutil.rmtree(WEIGHTS, ignore_errors=True)  # or else the run resumes
    command = f"""navit train configs/quickstart.py --workdir {WEIGHTS} data.rows=4
        train.steps=150 optim.warmup_steps=15 data.eval.size=32 eval.budgets=64"""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    print(
        "\n".join(done.stdout.splitlines()[-12:]), done.stderr[-2000:] * done.returncode
    )
    done.check_returncode()

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

import navit

model = navit.load(WEIGHTS)
vision = model.config.model.vision
print(
    f"image tower: width {vision.width}, {vision.depth} layers, patches of "
    f"{vision.patch_size} pixels, pooled by {vision.pool}"
)

# %% [markdown]
# ## Images and texts
#
# With the tiny model, the images are 96 drawn ones that it has not seen, and there are
# two questions: the colour of the figure (*coarse*) and the colour of the dots
# (*fine*). With released weights, the images are the photographs of `data/sample`, and
# the question is which caption belongs to which photograph.

# %%
from navit.config import Folder, Synthetic

if DRAWN:
    source = navit.open_source(Synthetic(size=96, seed=1))
    coarse, fine = source.tasks["coarse"], source.tasks["fine"]
    questions = {
        "coarse": (coarse.class_names, coarse.labels),
        "fine": (fine.class_names, fine.labels),
    }
else:
    source = navit.open_source(Folder("data/sample"))
    captions = [source.record(i).captions[0] for i in range(len(source))]
    questions = {"caption": (captions, np.arange(len(source)))}
images = [source.record(i).image for i in range(len(source))]
for name, (texts, answers) in questions.items():
    asked = (answers >= 0).sum()
    print(f"{name}: {asked} images, {len(texts)} texts, such as {texts[0]!r}")

# %% [markdown]
# ## Embed and classify
#
# `embed_images` and `embed_texts` return vectors of unit norm. The texts are embedded
# once, whatever the budget. The best text for an image is the one with the largest
# logit.

# %%
BUDGETS = (256, 729, 1024)
vectors = {}
text_vectors = {
    name: model.embed_texts(texts) for name, (texts, _) in questions.items()
}
print(
    f"{'tokens':>6}{'used':>7}{'seconds':>9}" + "".join(f"{n:>10}" for n in questions)
)
for budget in BUDGETS:
    start = time.perf_counter()
    vectors[budget] = model.embed_images(images, max_tokens=budget)
    seconds = time.perf_counter() - start
    grids = [navit.grid_for(*size, max_tokens=budget) for size in source.sizes.tolist()]
    line = f"{budget:6}{np.prod(grids, axis=1).mean():7.0f}{seconds:9.1f}"
    for name, (_, answers) in questions.items():
        guesses = model.logits(vectors[budget], text_vectors[name]).argmax(-1)
        accuracy = (guesses == answers)[answers >= 0].mean()
        line += f"{accuracy:10.1%}"
        assert name != "coarse" or accuracy > 0.8
    print(line)
print(f"{'chance':22}" + "".join(f"{1 / len(t):10.1%}" for t, _ in questions.values()))

# %% [markdown]
# *Used* is the mean number of tokens: a grid seldom meets its budget exactly. The time
# includes the compilation for the budget's shapes, once per budget.
#
# The tiny model answers the coarse question at all three budgets, of which it was
# trained at none: its images had 64 or 144 tokens. The fine question is another matter.
# Dots need tokens to be seen, and steps to be learned, and 150 steps are too few.
# `configs/budgets_demo.py` takes 1,200 steps, and its accuracy on dots grows with the
# budget (see the README).
#
# How much does the vector of an image depend on the budget? This is the cosine between
# budgets, averaged over the images, beside that of two different images:

# %%
for budget in (729, 1024):
    same = (vectors[256] * vectors[budget]).sum(-1).mean()
    print(f"the same image at 256 and {budget} tokens: {same:.3f}")
pairs = vectors[256] @ vectors[256].T
other = pairs[~np.eye(len(pairs), dtype=bool)].mean()
print(f"two images at 256 tokens: {other:.3f}")

# %% [markdown]
# ## Where the pooling head looks
#
# The tower ends in one vector per token. The pooling head (MAP, multihead attention
# pooling) makes one vector of an image: a learned query attends over the image's
# tokens. Its weights say how much each token counts. `model.vision.pooling_weights`
# returns them for a packed batch, and `navit.unpack` makes a map of each image.

# %%
P = vision.patch_size


def pooling_maps(images, budget):
    """A picture `[h, w, 3]` and a map `[rows, columns]` of each image."""
    packed, index = navit.pack(
        images, patch_size=P, max_tokens=budget, row_tokens=1024, return_index=True
    )
    out = model.vision(packed)
    weights = model.vision.pooling_weights(out.packed)
    maps = [m.mean(-1) for m in navit.unpack(weights, out.packed, index)]
    patches = navit.unpack(packed.patches, packed, index)
    return [picture(grid) for grid in patches], maps


def picture(patches):
    """Patches `[rows, columns, P * P * 3]` as one picture."""
    rows, columns, _ = patches.shape
    pixels = patches.reshape(rows, columns, P, P, 3).swapaxes(1, 2)
    return pixels.reshape(rows * P, columns * P, 3)


drawn = [images[i] for i in range(3)] if DRAWN else []
photographs = [Path("data/sample") / name for name in ("cat.jpg", "rocket.jpg")]
chosen = [*drawn, *photographs]
figure, axes = plt.subplots(
    len(chosen), 1 + len(BUDGETS), figsize=(9, 1.75 * len(chosen)), layout="constrained"
)
for column, budget in enumerate(BUDGETS, start=1):
    pictures, maps = pooling_maps(chosen, budget)
    for row, (pixels, weights) in enumerate(zip(pictures, maps, strict=True)):
        assert abs(weights.sum() - 1) < 1e-3
        height, width = pixels.shape[:2]
        axes[row, 0].imshow(pixels)
        axes[row, column].imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
        axes[row, column].imshow(
            weights, cmap="inferno", alpha=0.65, extent=(0, width, height, 0)
        )
        axes[row, column].set_title("{} × {}".format(*weights.shape), size=8)
        axes[0, column].set_title(
            f"{budget} tokens\n{maps[0].shape[0]} × {maps[0].shape[1]}", size=8
        )
for ax in axes.flat:
    ax.set_axis_off()
plt.show()

# %% [markdown]
# The maps are the mean over the heads; bright tokens count most, and each map has its
# own scale. The weights of an image sum to 1 whatever its number of tokens, which is
# one reason why the budget can change after training.
#
# For drawn images the answer is known, so the map can be measured: how much of the
# weight lies on coloured patches, against their share of the area?

# %%
if DRAWN:
    for budget in BUDGETS:
        pictures, maps = pooling_maps(images[:32], budget)
        area, weight = [], []
        for pixels, weights in zip(pictures, maps, strict=True):
            coloured = np.ptp(pixels.astype(int), axis=-1) > 40
            rows, columns = weights.shape
            share = coloured.reshape(rows, P, columns, P).mean((1, 3))
            area.append(share.mean())
            weight.append((share * weights).sum())
        print(
            f"{budget:5} tokens: {np.mean(area):.0%} of the area is coloured, and has "
            f"{np.mean(weight):.0%} of the weight"
        )
        assert np.mean(weight) > np.mean(area)

# %% [markdown]
# The tiny model looks at what its captions name. On the photographs at the bottom it
# has nothing to look for, because it never saw one: with `WEIGHTS` set, the same cell
# shows where SigLIP 2 looks.
#
# ## The same on the command line
#
# ```sh
# navit eval WEIGHTS --budgets 64,256,729,1024 --out results   # tables and a plot
# navit embed WEIGHTS photos/ --max-tokens 729 --out z.npz     # vectors of files
# ```
