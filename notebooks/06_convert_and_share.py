# %% [markdown]
# # Convert and share
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/06_convert_and_share.ipynb)
#
# A trained model is worth more if others can open it. You will write one in Hugging
# Face's and in big_vision's format, read both back, check that not a bit of the weights
# changed and that the embeddings are equal, and fill in a model card that says what a
# user has to know: budgets, text settings, data, and numbers.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. A T4 or a TPU only makes the short training faster.

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
import shutil
from importlib.metadata import metadata
from string import Template

import jax
import numpy as np
from IPython.display import Markdown

import navit

# %% [markdown]
# ## A model to share
#
# A minute of training on the built-in drawn dataset. It learns the colours of large
# figures and nothing else, which is enough to see that nothing is lost on the way.

# %%
ROOT = Path("runs/notebook_06")
RUN, HUGGINGFACE, BIG_VISION = ROOT / "run", ROOT / "huggingface", ROOT / "model.npz"
shutil.rmtree(ROOT, ignore_errors=True)
COMMAND = f"""
navit train configs/quickstart.py --workdir {RUN} train.steps=60 train.log_every=20
data.budgets=36,64 data.row_tokens=256 data.slots=8 optim.warmup_steps=10
eval.budgets=64,256 data.eval.size=128 eval.tasks=coarse:zero_shot,retrieval
"""
done = subprocess.run(COMMAND.split(), stdout=subprocess.PIPE, text=True, check=True)
print("\n".join(line for line in done.stdout.splitlines() if line.startswith("step ")))

# %% [markdown]
# ## Out
#
# `navit convert` takes a work directory or weights in any format. A directory becomes
# Hugging Face's, and a name that ends in .npz big_vision's. In Python,
# `navit.save(model, path)` does the same.

# %%
for out in (HUGGINGFACE, BIG_VISION):
    subprocess.run(["navit", "convert", RUN, out], check=True)
for file in sorted([*HUGGINGFACE.iterdir(), BIG_VISION]):
    print(f"{file.stat().st_size:10,} bytes  {file.relative_to(ROOT)}")

# %% [markdown]
# `config.json` is that of a `Siglip2Model`, so the directory opens in transformers too:
#
# ```python
# from transformers import AutoModel
#
# model = AutoModel.from_pretrained("runs/notebook_06/huggingface")
# ```

# %%
print((HUGGINGFACE / "config.json").read_text())

# %% [markdown]
# ## In
#
# `navit.load` recognises the format by the content. The tokenizer lies beside the
# weights in the Hugging Face directory. An .npz has no place for this model's
# tokenizer, which is bytes and not a file, so we name it.

# %%
models = {
    "navit": navit.load(RUN),
    "huggingface": navit.load(HUGGINGFACE),
    "big_vision": navit.load(BIG_VISION, overrides=["model.text.tokenizer=bytes"]),
}
photographs = sorted(Path("data/sample").glob("*.jpg"))
texts = ["red", "green", "blue", "white dots"]
weights, vectors = {}, {}
for name, model in models.items():
    weights[name] = jax.tree.leaves(model.model)
    vectors[name] = (
        model.embed_images(photographs, max_tokens=64),
        model.embed_images(photographs, max_tokens=256),
        model.embed_texts(texts),
    )
for name in ("huggingface", "big_vision"):
    for what, values in (("weights", weights), ("vectors", vectors)):
        pairs = zip(values["navit"], values[name], strict=True)
        equal = [np.array_equal(ours, theirs) for ours, theirs in pairs]
        print(f"{name:12} {what}: {sum(equal)} of {len(equal)} arrays are equal")
        assert all(equal)

# %% [markdown]
# Every array is equal, bit by bit, and so are the embeddings. Released SigLIP 2 weights
# take the same ways: `hf download google/siglip2-base-patch16-naflex`, then
# `navit.load`, then `init=PATH` to train them further.
# [docs/weights.md](../docs/weights.md) has the details.
#
# ## The card
#
# `docs/model_card.md` is a template. What the run knows about itself is in
# `config.json` and `budgets.json`; what only you know are its name, its licence, and
# what it is for.

# %%
model = models["navit"]
run = model.config
results = json.loads((RUN / "budgets.json").read_text())["rows"]
metrics = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
batch = np.mean([line["images_per_step"] for line in metrics if "loss" in line])


def size_of(tower):
    return f"{tower.width}, {tower.depth}, {tower.num_heads}, {tower.mlp_dim}"


def parameters_of(tower):
    return f"{sum(leaf.size for leaf in jax.tree.leaves(tower)):,}"


names = {
    "accuracy": "zero-shot accuracy",
    "image_to_text_r1": "image→text R@1",
    "text_to_image_r1": "text→image R@1",
}
table = [
    "| set | metric | budget | used | enlarged | result | note |",
    "|---" * 7 + "|",
]
for row in sorted(results, key=lambda row: row["budget"]):
    for metric in (name for name in names if name in row["metrics"]):
        table.append(
            f"| {row['set']} | {names[metric]} | {row['budget']} "
            f"| {row['tokens_per_image']:.0f} | {row['enlarged']:.0%} "
            f"| {row['metrics'][metric]:.1%} ({row['chance'][metric]:.1%}) "
            f"| {'; '.join(row['notes'])} |"
        )
vision, text, data, optim = run.model.vision, run.model.text, run.data, run.optim
facts = {
    "name": "drawn-figures-tiny",
    "license": "apache-2.0",
    "summary": "A demonstration that names the colour of a large figure in a drawing.",
    "limits": "It knows drawn figures of seven colours. Do not use it on photographs.",
    "path": "drawn-figures-tiny",
    "data": "20,000 drawn images (`Synthetic(size=20_000, seed=0)`), evaluated on 128 "
    "others (`seed=1`). The images are free of any licence.",
    # The rest comes from the run.
    "url": metadata("navit")["Home-page"],
    "version": navit.__version__,
    "patch_size": vision.patch_size,
    "vision_size": size_of(vision),
    "text_size": size_of(text),
    "vision_parameters": parameters_of(model.vision),
    "text_parameters": parameters_of(model.text),
    "budget": max(data.budgets),
    "budgets": " and ".join(map(str, data.budgets)),
    "text_length": text.length,
    "tokenizer": f"`{text.tokenizer}`",
    "vocabulary": f"{text.vocab_size} ids",
    "prompts": ", ".join(f"`{prompt}`" for prompt in run.eval.prompts),
    "steps": run.train.steps,
    "batch": round(batch),
    "seen": f"{round(batch * run.train.steps):,}",
    "loss": " + ".join(part.short for part in run.train.losses),
    "learning_rate": optim.lr,
    "weight_decay": optim.weight_decay,
    "results": "\n".join(table),
}
card = Template(Path("docs/model_card.md").read_text()).substitute(facts)
(HUGGINGFACE / "README.md").write_text(card)
shutil.copyfile(RUN / "config.json", HUGGINGFACE / "navit_config.json")
Markdown(card.split("---", 2)[2])

# %% [markdown]
# `substitute` raises an error for a place that nobody filled in, so a card is never
# half empty. `navit_config.json` is the complete configuration of the run. The folder
# is ready to be uploaded:
#
# ```sh
# hf upload YOUR_NAME/drawn-figures-tiny runs/notebook_06/huggingface
# ```
#
# Next: [your own loop](07_your_own_loop.ipynb).
