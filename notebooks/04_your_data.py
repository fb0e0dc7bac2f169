# %% [markdown]
# # Your data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/04_your_data.ipynb)
#
# Training reads a folder of photographs, tar shards, TFDS or ArrayRecord files, and a
# few other formats. You will store the sample photographs in each, see that the batches
# are the same, index the sizes of a larger set, and choose a row length and a number of
# slots from its plan, before any image is decoded.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. Everything here runs on the CPU of the host, so a T4 or a TPU changes nothing.

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
import csv
import dataclasses
import io
import shutil
import tarfile
from importlib.util import find_spec

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from PIL import Image as Picture

import navit
from navit import config

SET = Path("runs/notebook_04")
shutil.rmtree(SET, ignore_errors=True)


def navit_command(line):
    print(subprocess.check_output(["navit", *line.split()], text=True))


# %% [markdown]
# ## A folder with a table
#
# The simplest form: images and one table with the columns `file`, `caption` and, if you
# have classes, `label`. The table is CSV, JSONL or Parquet.

# %%
shutil.copytree("data/sample", SET / "folder", ignore=shutil.ignore_patterns(".*"))
lines = (SET / "folder/captions.csv").read_text().splitlines()
table = list(csv.DictReader(lines))
print(*lines[:4], "...", sep="\n")

folder = navit.open_source(config.Folder(f"{SET}/folder"))
print(
    f"\n{len(folder)} images; classes: {', '.join(folder.tasks['label'].class_names)}"
)
print("sizes (height, width):", *map(tuple, folder.sizes[:4].tolist()), "...")

# %% [markdown]
# ## Tar shards
#
# In the WebDataset layout, the files of one sample are neighbours in the tar and share
# a name: `0003.jpg`, `0003.txt`. img2dataset writes such shards. Choose shards of some
# hundred MB.

# %%
(SET / "tars").mkdir()
for shard, part in enumerate((table[:9], table[9:])):
    with tarfile.open(SET / f"tars/{shard:05}.tar", "w") as tar:
        for number, row in enumerate(part):
            file = SET / "folder" / row["file"]
            parts = {file.suffix: file.read_bytes(), ".txt": row["caption"].encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{shard:02}{number:02}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
with tarfile.open(SET / "tars/00000.tar") as tar:
    print(*tar.getnames()[:4], "...")

sources = {
    "folder": config.Folder(f"{SET}/folder"),
    "tar shards": config.TarShards(f"{SET}/tars/{{00000..00001}}.tar"),
}

# %% [markdown]
# ## TFDS and ArrayRecord
#
# TFDS describes a dataset with a builder and stores it in ArrayRecord files, which give
# random access. navit reads both the prepared dataset and the files alone, without
# TensorFlow. Only preparing one takes `pip install tensorflow-datasets`; without it,
# this cell is skipped. `data/builders/` has builders for Flickr30k and TextCaps.

# %%
if find_spec("tensorflow_datasets"):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class SamplePhotographs(tfds.core.GeneratorBasedBuilder):
        """The sample photographs with their captions."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path.cwd()  # where a builder's own files would lie

        def _info(self):
            features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(table)}

        def _generate_examples(self, rows):
            for key, row in enumerate(rows):
                image = io.BytesIO((SET / "folder" / row["file"]).read_bytes())
                yield key, {"image": image, "text": row["caption"]}

    builder = SamplePhotographs(data_dir=SET / "tfds", file_format="array_record")
    builder.download_and_prepare()
    name, stored = "sample_photographs", f"{SET}/tfds/sample_photographs/1.0.0"
    sources["TFDS"] = config.Tfds(name, data_dir=f"{SET}/tfds", caption="text")
    sources["ArrayRecord"] = config.ArrayRecords(stored, caption="text")
    print(*(file.name for file in sorted(Path(stored).iterdir())), sep="\n")

# %% [markdown]
# ## The same batches
#
# A source is one field of the config, `data.train`; on a command line it is
# `data.train=tars:PATH`, `folder:PATH`, `tfds:NAME` and so on. Whatever the format,
# training gets the same batch type. The order of the records may differ, the records do
# not:

# %%
experiment = config.load("configs/photos.py")


def batch_of(source):
    data = dataclasses.replace(experiment.data, train=source, eval=None)
    return next(navit.train_batches(dataclasses.replace(experiment, data=data)))


def records_of(source):
    opened = navit.open_source(source)
    records = [opened.record(index) for index in range(len(opened))]
    pixels = navit.pack([record.image for record in records], slots=1).patches
    texts = [record.captions for record in records]
    return {text: image.tobytes() for text, image in zip(texts, pixels, strict=True)}


expected = records_of(sources["folder"])
for name, source in sources.items():
    batch = batch_of(source)
    assert records_of(source) == expected
    print(
        f"{name:12} {len(expected)} records; first batch: {(batch.id >= 0).sum()} "
        f"images, {(batch.images.segment_ids > 0).mean():.1%} of the tokens filled"
    )

# %% [markdown]
# Here is that batch: each row of the picture is a row of tokens, and each colour an
# image. Its images have different budgets (64, 144 or 256 tokens), drawn anew in each
# epoch. The photographs are too few to reach the last row.

# %%
segments = batch_of(sources["tar shards"]).images.segment_ids
figure, axis = plt.subplots(figsize=(9, 1.8), layout="constrained")
colours = plt.get_cmap("tab10").with_extremes(bad="white")
drawn = np.ma.masked_equal(segments, 0)
axis.imshow(drawn, cmap=colours, vmin=1, vmax=10, aspect="auto", interpolation="none")
_ = axis.set(xlabel="token of the row", ylabel="row", yticks=range(len(segments)))

# %% [markdown]
# ## Held-out images
#
# `split="train"` and `split="eval"` of a `Folder` share one table: a hash of the file's
# name decides, so an image stays on its side when others are added.

# %%
split = {
    part: navit.open_source(config.Folder(f"{SET}/folder", split=part, holdout=0.2))
    for part in ("train", "eval")
}
names = {
    part: {Path(source.name(i)).name for i in range(len(source))}
    for part, source in split.items()
}
print({part: len(found) for part, found in names.items()})
assert not names["train"] & names["eval"]
assert len(names["train"] | names["eval"]) == len(table)

# %% [markdown]
# ## The sizes index
#
# Seventeen photographs are too few to plan. So we write a larger set, of 1,500 blank
# files with the sizes that photographs have: only the sizes matter to the plan. `navit
# index` reads the header of every image once, keeps the sizes in `.navit/` beside the
# data, and prints how they are distributed. Training does this too.

# %%
rng = np.random.default_rng(0)
aspects = rng.choice([9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9], 1500)
long_sides = np.clip(480 * np.exp(rng.normal(0, 0.35, 1500)), 100, 2000)
(SET / "large").mkdir()
with (SET / "large/captions.csv").open("w") as file:
    file.write("file,caption\n")
    for number, (aspect, long) in enumerate(zip(aspects, long_sides, strict=True)):
        size = round(long * min(1, aspect)), round(long * min(1, 1 / aspect))
        Picture.new("L", size).save(SET / f"large/{number:04}.jpg")
        file.write(f"{number:04}.jpg,a blank page\n")

LARGE = f"data.train=folder:{SET}/large data.train.split=all data.eval=none"
navit_command(f"index configs/photos.py {LARGE}")
print(*(file.name for file in (SET / "large/.navit").iterdir()), sep="\n")

# %% [markdown]
# ## The plan
#
# An image's number of tokens follows from its size, so navit knows which image goes
# into which row before it decodes one. `navit plan` prints what each row length would
# cost; the star marks the one in the config. Here the budgets are SigLIP 2's, 128 to
# 1024 tokens.

# %%
BUDGETS = "data.budgets=128,256,576,784,1024 data.slots=none data.rows=32"
navit_command(
    f"plan configs/photos.py {LARGE} {BUDGETS} --rows 1152,2048,4096 "
    f"--out {SET}/plan.png"
)
Image(SET / "plan.png", width=800)

# %% [markdown]
# **Row length.** Padding falls with the number of images that a row can hold: in rows
# as long as the largest image, a second long image never fits. But on a TPU a token in
# a long row costs more attention, so rows of about 1024 tokens are a good start (see
# [docs/packing.md](../docs/packing.md)). 1152 = 576 + 576 = 1024 + 128 suits these
# budgets. On a CPU, attention is computed image by image, and long rows cost nothing.
#
# **Slots.** `slots` is the most images in a row. With `data.slots=none`, it is twice
# the mean number, as a power of two. Too few slots close rows early, and too many give
# the text tower empty captions to compute. The same row length with fewer and more:

# %%
for slots in (2, 4, 16):
    options = f"{BUDGETS} data.row_tokens=1152 data.slots={slots}"
    command = ["navit", "plan", "configs/photos.py", "--rows", "1152"]
    text = subprocess.check_output([*command, *f"{LARGE} {options}".split()], text=True)
    lines = text.splitlines()
    if slots == 2:
        print(lines[1])
    print(next(line for line in lines if "*" in line))

# %% [markdown]
# If the text tower's share matters, group rows: with `data.caption_rows=8`, eight rows
# share one list of captions, and the plan keeps that list nearly full.

# %%
navit_command(
    f"plan configs/photos.py {LARGE} {BUDGETS} data.row_tokens=1152 data.slots=4 "
    "data.caption_rows=8 --rows 1152"
)

# %% [markdown]
# Then train, on whichever format you have:
#
# ```sh
# navit train configs/photos.py 'data.train=tars:~/set/{00000..00099}.tar' \
#     data.eval=folder:~/held_out data.row_tokens=1152 data.slots=4
# ```
#
# [docs/data.md](../docs/data.md) has all formats, missing files, mixtures and buckets.
# Next: [convert and share](06_convert_and_share.ipynb).
