# %% [markdown]
# # Your own loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/07_your_own_loop.ipynb)
#
# navit's parts work without its commands. You will train the image tower in a plain
# optax loop with a loss of your own, first on images that you pack, then on the batches
# of a data pipeline; read its dense features with a linear probe; and freeze it under a
# new head. Everything comes from `navit`, `jax` and `optax`.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. On a T4 or a TPU the same code runs there, with matrix products in bfloat16; the
# model below is too small to gain from it.

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
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import navit
from navit.config import Config, DataConfig, ModelConfig, Synthetic, VisionConfig

# %% [markdown]
# ## A classifier
#
# The built-in dataset draws images of any size with a large figure, whose colour is the
# class. Any list of images works as well: arrays, PIL images or paths.

# %%
source = navit.open_source(Synthetic(size=1200))
images = [source.record(index).image for index in range(len(source))]
labels = source.tasks["coarse"].labels
names = source.tasks["coarse"].class_names
print(f"{len(images)} images of {len(names)} classes: {', '.join(names)}")
print(f"sides from {source.sizes.min()} to {source.sizes.max()} pixels")

# %% [markdown]
# `navit.pack(images, rows=8, slots=8)` returns arrays of one shape for any images, so
# that `jax.jit` compiles once. It also returns which image each slot holds, and which
# images did not fit; the loop gives those to the next batch first.

# %%
TOKENS, SHAPE = 64, {"max_tokens": 64, "row_tokens": 256, "rows": 8, "slots": 8}


def batches(rng):
    """Packed images and the class of each slot, -1 where a slot is empty; no end."""
    waiting = []
    while True:
        while len(waiting) < 40:  # more than the rows can hold
            waiting += rng.permutation(len(images)).tolist()
        taken, waiting = np.array(waiting[:40]), waiting[40:]
        packed, index, left_out = navit.pack([images[i] for i in taken], **SHAPE)
        waiting = taken[left_out].tolist() + waiting
        yield packed, np.where(index < 0, -1, labels[taken[index]])


packed, classes = next(batches(np.random.default_rng(0)))
print({name: array.shape for name, array in packed._asdict().items()})
print(f"{(classes >= 0).sum()} images; the slots of the first row: {classes[0]}")

# %% [markdown]
# The tower is a pytree of arrays, like the head beside it. So `jax.value_and_grad`,
# `optax` and `jax.jit` take both in one dictionary. `tower(packed).pooled` has a vector
# for each slot. Slots can be empty, and the loss does not count them.

# %%
tower = navit.Vision(VisionConfig(width=96, depth=2, mlp_dim=192, num_heads=2))
head = {"kernel": jnp.zeros((96, len(names))), "bias": jnp.zeros(len(names))}
params = {"tower": tower, "head": head}
optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, 80), weight_decay=1e-4)
opt_state = optimizer.init(params)
traces = 0


def loss_of(params, packed, classes, max_tokens=TOKENS):
    # The most tokens of an image let attention choose a cheaper implementation.
    pooled = params["tower"](packed, max_image_tokens=max_tokens).pooled  # [b, s, d]
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    real = (classes >= 0) & (packed.grids[..., 0] > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(classes, 0)
    )
    right = (logits.argmax(-1) == classes) & real
    return (losses * real).sum() / real.sum(), right.sum() / real.sum()


@jax.jit
def step(params, opt_state, packed, classes):
    global traces
    traces += 1  # runs when JAX traces the function, not when the step runs
    (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        params, packed, classes
    )
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, accuracy


history = []
for packed, classes in itertools.islice(batches(np.random.default_rng(0)), 60):
    params, opt_state, loss, accuracy = step(params, opt_state, packed, classes)
    history.append((float(loss), float(accuracy)))
    if len(history) % 10 == 0:
        print(f"step {len(history):3}  loss {loss:.3f}  accuracy {accuracy:.1%}")
assert traces == 1, "the step was compiled more than once"

# %% [markdown]
# `traces` counts how often JAX traced the step, which it does before it compiles: once
# for all batches. On images that the model has not seen, at the budget of training and
# beyond it:

# %%
unseen = navit.open_source(Synthetic(size=128, seed=1))
new_images = [unseen.record(index).image for index in range(len(unseen))]


evaluate = jax.jit(loss_of, static_argnames="max_tokens")


def accuracy_at(max_tokens):
    packed, index = navit.pack(
        new_images, max_tokens=max_tokens, row_tokens=1024, return_index=True
    )
    classes = np.where(index < 0, -1, unseen.tasks["coarse"].labels[index])
    return float(evaluate(params, packed, classes, max_tokens=max_tokens)[1])


for budget in (16, 64, 256):
    score = accuracy_at(budget)
    print(f"{budget:4} tokens: {score:.1%} (chance {1 / len(names):.1%})")
    assert score > 0.6

# %% [markdown]
# ## Batches from the pipeline
#
# `navit.train_batches(config)` yields the batches of `navit train`: the epoch is
# planned in advance, images are decoded in the background, and batch number i depends
# only on the config and on i. The source is `config.data.train` (a folder, tar shards,
# TFDS, ...). You can also pass one that you opened, or your own object with `sizes`,
# `record(index)` and the other members of `navit.sources.source.Source`.

# %%
config = Config(
    model=ModelConfig(vision=tower.config),
    data=DataConfig(train=Synthetic(), budgets=(36, 64), row_tokens=256, slots=8),
)
batch = next(navit.train_batches(config))
assert batch.images.patches.shape == packed.patches.shape  # rows=8, as above
for name in ("text", "owner", "label", "id", "size"):
    print(f"{name:6} {getattr(batch, name).shape}")

# %% [markdown]
# `batch.images` are the packed images and `batch.label` has the classes, -1 in an empty
# slot. An image that cannot be read leaves its slot without a grid, which is why the
# loss above also looks at `grids`. The shapes are those of the batches above, so even
# the compiled step is the same.

# %%
feed = navit.train_batches(config, navit.open_source(config.data.train), start_step=1)
for number, batch in enumerate(itertools.islice(feed, 20), start=1):
    params, opt_state, loss, accuracy = step(
        params, opt_state, batch.images, batch.label
    )
    if number % 10 == 0:
        print(f"batch {number:3}  loss {loss:.3f}  accuracy {accuracy:.1%}")
feed.close()
assert traces == 1

# %% [markdown]
# ## Dense features
#
# The tower also returns a vector for each patch. `navit.unpack` gives them as one
# `[rows, columns, d]` array for each image. Do they say where the figure is? The drawn
# background is grey, so the pixels know the answer: a patch counts as coloured if most
# of its pixels are not grey. A linear probe learns this from the features of half of
# the images, and another one from their pixels.

# %%
packed, index = navit.pack(new_images, max_tokens=256, return_index=True)
tower = params["tower"]
features = navit.unpack(jax.jit(tower)(packed).packed, index=index)
pixels = navit.unpack(packed.patches, packed, index=index)  # [rows, columns, 16*16*3]


def coloured(patches):
    colours = patches.reshape(*patches.shape[:2], -1, 3).astype(int)
    return (np.ptp(colours, axis=-1) > 40).mean(-1) > 0.5


truth = [coloured(patches) for patches in pixels]


def probe(arrays):
    """Ridge regression on half of the images; predictions for all of them."""
    joined = [np.concatenate([x, np.ones_like(x[..., :1])], -1) for x in arrays]
    x = np.concatenate([x.reshape(-1, x.shape[-1]) for x in joined[:64]])
    y = np.concatenate([mask.ravel() for mask in truth[:64]])
    weight = np.where(y, 1 / y.sum(), 1 / (~y).sum())[:, None]  # both classes alike
    gram = x.T @ (weight * x) + 1e-3 * np.eye(x.shape[1])
    solution = np.linalg.solve(gram, (weight * x).T @ (2.0 * y - 1))
    return [array @ solution > 0 for array in joined]


def accuracy_of(masks):
    """The share of right patches in the other half, the mean of both classes."""
    guess, true = (np.concatenate([x.ravel() for x in y[64:]]) for y in (masks, truth))
    return (guess[true].mean() + (~guess[~true]).mean()) / 2


from_features = probe(features)
from_pixels = probe([patches / 255.0 for patches in pixels])
print(f"linear probe of the features: {accuracy_of(from_features):.1%}")
print(f"linear probe of the pixels:   {accuracy_of(from_pixels):.1%} (chance 50 %)")
assert accuracy_of(from_features) > accuracy_of(from_pixels) + 0.05

# %%
shown = np.argsort([-mask.size for mask in truth[64:]])[[0, 9, 18, 27, 36]] + 64
figure, axes = plt.subplots(3, len(shown), figsize=(9, 5.4), layout="constrained")
for column, i in zip(axes.T, shown, strict=True):
    column[0].imshow(new_images[i])
    column[1].imshow(truth[i], cmap="gray", vmin=0, vmax=1)
    column[2].imshow(from_features[i], cmap="gray", vmin=0, vmax=1)
for axis, name in zip(axes[:, 0], ("image", "coloured", "probe"), strict=True):
    axis.set_ylabel(name)
for axis in axes.ravel():
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# The greys lie among the colours, not on one side of them, so no weighted sum of pixels
# tells the two apart. For the features, a weighted sum does much better.
#
# ## A frozen tower
#
# `optax.multi_transform` gives each part of the parameters its own optimizer, and the
# frozen part none. Here a new head learns whether the figure's colour is warm, on top
# of the tower that learned the colours.

# %%
warm = np.isin(names, ("red", "yellow", "orange", "brown"))
labels = warm[source.tasks["coarse"].labels].astype(int)  # what `batches` reads
optimizer = optax.multi_transform(
    {"frozen": optax.set_to_zero(), "trained": optax.adam(3e-3)},
    {"tower": "frozen", "head": "trained"},
)
start = {"tower": tower, "head": {"kernel": jnp.zeros((96, 2)), "bias": jnp.zeros(2)}}
params, opt_state, traces = start, optimizer.init(start), 0
history = []
for packed, classes in itertools.islice(batches(np.random.default_rng(1)), 40):
    params, opt_state, loss, accuracy = step(params, opt_state, packed, classes)
    history.append(float(accuracy))
print(f"accuracy {history[0]:.1%} -> {np.mean(history[-10:]):.1%}")
assert np.mean(history[-10:]) > 0.85

moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, params)
print("the head moved:", moved["head"])
assert not any(jax.tree.leaves(moved["tower"])), "the frozen tower changed"

# %% [markdown]
# No bit of the tower moved. `step` is the function from above: it reads the new
# `optimizer` when it is traced again, which the new shape of the head makes it do.
# `jax.lax.stop_gradient` on the tower is the other way, and works with any optimizer.
# Both leave the backward pass of the tower out of the compiled program, because nothing
# uses it. The compiler's own count of operations shows it:


# %%
def flops(loss, optimizer):
    """Floating-point operations of a step, as XLA counts them."""

    def step(params, packed, classes):
        gradient = jax.grad(lambda *x: loss(*x)[0])(params, packed, classes)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)["head"], updates["tower"]

    compiled = jax.jit(step).lower(params, packed, classes).compile()
    return compiled.cost_analysis()["flops"]


def stopped(params, packed, classes):
    tower = jax.lax.stop_gradient(params["tower"])
    return loss_of({**params, "tower": tower}, packed, classes)


adam = optax.adam(3e-3)
whole = flops(loss_of, adam)
ways = {"multi_transform": (loss_of, optimizer), "stop_gradient": (stopped, adam)}
for name, way in ways.items():
    share = flops(*way) / whole
    print(f"{name:15} {share:.0%} of the operations of training the whole model")
    assert share < 0.6

# %% [markdown]
# A tower that navit trained, or released weights, take the place of the random one
# above: `navit.load(path).vision` is the same class. For images without labels of your
# own, see [training](03_train_contrastive.ipynb) and [one checkpoint, any
# budget](02_one_checkpoint_any_budget.ipynb).
