# %% [markdown]
# # Train a contrastive model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/03_train_contrastive.ipynb)
#
# An image tower and a text tower learn to give an image and its caption similar
# vectors. You will train a small pair of them on the built-in drawn dataset, interrupt
# the run and resume it, watch the loss and the fill of the rows, and evaluate the one
# checkpoint at several token budgets.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. The commands below use a GPU or a TPU if there is one. This model is too small to
# need it; on a T4, raise `data.rows`, the rows of a batch, and `train.steps`, or train
# `configs/budgets_demo.py`, which also learns the fine task.

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
import json
import math
import shutil
import signal

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown

import navit
from navit import config

# %% [markdown]
# ## The data
#
# Each image shows a large figure of one colour and, if it is large enough, a few dots
# of another colour. The *coarse* task asks for the colour of the figure, which is
# visible at any budget. The *fine* task asks for the colour of the dots, which may be
# two pixels wide. An image has several captions, and one of them is drawn each epoch.

# %%
experiment = config.load("configs/quickstart.py")
source = navit.open_source(experiment.data.eval)
task = source.tasks["coarse"]
shown = np.unique(task.labels, return_index=True)[1]  # one of each colour
figure, axes = plt.subplots(1, len(shown), figsize=(11, 2.9), layout="constrained")
for axis, index in zip(axes, shown, strict=True):
    image, captions = source.record(index)
    axis.imshow(image)
    axis.set_title("\n".join(captions), fontsize=9)
    axis.set_xlabel("{} × {}".format(*image.shape[:2]), fontsize=8)
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## Train, stop, resume
#
# A run is one command: a config file, a work directory, and changes to the config. Here
# the budgets are 36 and 64 tokens, a row has 256 tokens, and a batch has 8 rows, so
# that a step takes a fraction of a second on two CPU cores.

# %%
RUN = Path("runs/notebook_03")
STEPS = 100
COMMAND = f"""
navit train configs/quickstart.py --workdir {RUN} train.steps={STEPS} train.log_every=5
data.budgets=36,64 data.row_tokens=256 data.slots=8
eval.budgets=64,256,576 data.eval.size=128
eval.tasks=coarse:zero_shot,fine:zero_shot,retrieval
""".split()


def train(stop_after=math.inf):
    """Runs the command; presses Ctrl-C after the step `stop_after`."""
    run = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        print(line, end="")
        if line.startswith("step ") and f" {stop_after}/" in line:
            run.send_signal(signal.SIGINT)
    return run.wait()


shutil.rmtree(RUN, ignore_errors=True)
status = train(stop_after=30)
print("exit status", status)

# %% [markdown]
# Ctrl-C saves the state after the current step. A killed run goes on from its last
# checkpoint (`train.checkpoint_every`) instead. To resume, give the same command again.
# Batch number i depends only on the config and on i, so the resumed run sees the
# batches that it would have seen anyway.

# %%
assert train() == 0

# %% [markdown]
# ## Loss and fill
#
# `metrics.jsonl` has one line for each logged step. The softmax loss of a model that
# guesses is the logarithm of the number of pairs in a batch. It cannot reach 0 here,
# because a batch has more images than there are different captions: when two images are
# both captioned "red", nothing tells which "red" belongs to which.

# %%
metrics = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
metrics = [line for line in metrics if "loss" in line]
steps = [line["step"] for line in metrics]
assert steps == sorted(set(steps)) and steps[-1] == STEPS  # no step twice
pairs = np.mean([line["images_per_step"] for line in metrics])
fill = np.mean([line["fill"] for line in metrics])

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(steps, [line["loss"] for line in metrics], color="#4477aa")
left.axhline(math.log(pairs), color="grey", linestyle=":")
left.text(STEPS, math.log(pairs), "chance ", ha="right", va="bottom", color="grey")
left.set(xlabel="step", ylabel="softmax loss", ylim=(0, 4.2))
right.plot(steps, [100 * line["fill"] for line in metrics], color="#4477aa")
right.set(xlabel="step", ylabel="fill (% of the tokens)", ylim=(90, 100))
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
print(f"{pairs:.1f} images a step; {fill:.1%} of the tokens are not padding")
assert fill > 0.9

# %% [markdown]
# The fill is high because rows of 256 tokens hold several images of at most 64, and the
# plan chooses which images share a row before any of them is drawn.
#
# ## One checkpoint at several budgets
#
# The run ended with an evaluation at 64, 256 and 576 tokens. The checkpoint never saw
# images of more than 64 tokens in training, and the table says so. `navit eval` adds
# other budgets to it.

# %%
command = f"navit eval {RUN} --budgets 16,36 eval.tasks=coarse:zero_shot,fine:zero_shot"
subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
results = json.loads((RUN / "budgets.json").read_text())["rows"]
lines = [
    "| task | tokens | used | accuracy | chance | note |",
    "|---|---|---|---|---|---|",
]
for row in sorted(results, key=lambda row: (row["set"], row["budget"])):
    if row["kind"] == "zero_shot":
        accuracy, chance = row["metrics"]["accuracy"], row["chance"]["accuracy"]
        assert accuracy > 0.7 if row["set"] == "coarse" else accuracy < 0.4
        lines.append(
            f"| {row['set']} | {row['budget']} | {row['tokens_per_image']:.0f} "
            f"| {accuracy:.1%} | {chance:.1%} | {'; '.join(row['notes'])} |"
        )
Markdown("\n".join(lines))

# %% [markdown]
# The work directory also has the whole table (`budgets.md`, `.csv`, `.json`) and this
# plot of accuracy against tokens and against compute. The dashed lines are the cascades
# of the last evaluation: all images are answered at the small budget, and the uncertain
# ones again at the large one.

# %%
Image(RUN / "budgets.png", width=800)

# %% [markdown]
# The large figure's colour is learned, and every budget can tell it. The colour of the
# dots is not: a minute of training at 64 tokens is too little for it. The README's
# table "What tokens buy" is from a run that learns both.
#
# ## Ask the model
#
# `navit.load` opens the work directory. A class is a text, and the answer is the text
# whose vector is most similar to the image's.

# %%
model = navit.load(RUN)
images = [source.record(index).image for index in range(64)]
texts = model.embed_texts(task.class_names)
for budget in (36, 64, 256):
    logits = model.logits(model.embed_images(images, max_tokens=budget), texts)
    right = logits.argmax(1) == task.labels[:64]
    print(f"{budget:4} tokens: {right.sum()} of {len(right)} figures are named right")
    assert right.mean() > 0.5  # chance is 1 / 7

# %% [markdown]
# Next: [your own data](04_your_data.ipynb), or the same parts in [your own
# loop](07_your_own_loop.ipynb).
