# %% [markdown]
# # On a pod
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/navit/blob/main/notebooks/05_on_a_pod.ipynb)
#
# A run on many devices needs three decisions: how to lay the devices out (the mesh),
# what to split over them (the sharding), and whether the result fits in memory. This
# notebook draws the first two on eight simulated devices, compiles a training step for
# a TPU slice that you do not have, and starts a run in two processes, as on two hosts.

# %% [markdown]
# The next cell installs navit if you are in Colab, and finds the repository if you are
# not. Then it simulates eight devices on the CPU. It does so on a T4 or a TPU as well,
# because no Colab machine has as many; to use real devices, delete the last two lines.

# %%
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    clone = "git clone -q --depth 1 https://github.com/OWNER/navit"
    subprocess.run(f"{clone} && pip install -q './navit[tpu]'", shell=True, check=True)
    os.chdir("navit")
else:
    here = Path.cwd()
    os.chdir(next(p for p in [here, *here.parents] if (p / "data/sample").exists()))

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from navit.config import MeshConfig
from navit.model import variants
from navit.model.vision import Vision
from navit.sharding import make_mesh, use_mesh

print(f"{len(jax.devices())} devices: {jax.devices()[0].platform}")

# %% [markdown]
# ## The mesh
#
# navit's mesh has three axes. All three divide the work; they differ in what must be
# sent.
#
# * `data` splits the rows of a batch. Gradients are sent over it, once a step.
# * `fsdp` splits the rows as well, and every large parameter with its moments. The
#   weights of each layer are sent over it when the layer runs, and the gradients.
# * `tensor` splits attention heads and the hidden axis of MLPs. Activations are sent
#   over it, several times a layer.
#
# In a config they are `mesh.data`, `mesh.fsdp` and `mesh.tensor`; -1 takes the devices
# that are left. Here are four ways to lay out eight devices:

# %%
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
for name, config in MESHES.items():
    mesh, rules = make_mesh(config)
    print(f"{name:26}{dict(mesh.shape)}\n{'':26}{rules}")

# %% [markdown]
# `Rules` says which mesh axes each kind of array axis is split over: the rows of a
# batch (`batch`), the width of a parameter (`embed`), its heads and hidden units
# (`tensor`).
#
# ## The sharding
#
# The image tower of SigLIP 2's B/16 has 12 layers of width 768, whose MLPs have 3072
# hidden units. `jax.eval_shape` makes it without memory, and each parameter knows its
# sharding. Below, a batch of 16 rows of 1024 tokens, the first MLP kernel of all
# layers, `[12, 768, 3072]` (drawn without its 12 layers), and the biases of the keys. A
# colour is a device, and the numbers are the devices that hold a part.

# %%
ROWS, TOKENS = 16, 1024


def abstract(config):
    """A mesh, its rules, and the shapes and shardings of B/16's parameters on it."""
    mesh, rules = make_mesh(config)
    with use_mesh(mesh):
        tower = jax.eval_shape(lambda: Vision(variants.vision("B/16"), rules))
    named = jax.tree_util.tree_leaves_with_path(tower)
    return mesh, rules, {jax.tree_util.keystr(path): leaf for path, leaf in named}


def draw(ax, shape, sharding):
    """Draws an array's last two axes, split over devices."""
    height, width = shape[-2:] if len(shape) > 1 else (1, *shape)
    holders = {}
    for device, index in sharding.devices_indices_map(shape).items():
        sides = [
            part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
        ]
        sides = [(0, 1), *sides][-2:]
        holders.setdefault(tuple(sides), []).append(device.id)
    for ((top, bottom), (left, right)), ids in holders.items():
        box = (left / width, top / height)
        size = ((right - left) / width, (bottom - top) / height)
        colour = plt.get_cmap("Set3")(min(ids)) if len(ids) < 8 else "lightgrey"
        ax.add_patch(plt.Rectangle(box, *size, facecolor=colour, edgecolor="black"))
        label = ",".join(map(str, sorted(ids))) if len(ids) < 8 else "all"
        middle = (box[0] + size[0] / 2, box[1] + size[1] / 2)
        ax.text(*middle, label, ha="center", va="center", size=7)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


figure, axes = plt.subplots(4, 3, figsize=(9, 7.5), layout="constrained")
for line, (name, config) in zip(axes, MESHES.items(), strict=True):
    mesh, rules, parameters = abstract(config)
    kernel = next(
        k for k in parameters if "mlp" in k and parameters[k].shape == (12, 768, 3072)
    )
    bias = next(k for k in parameters if parameters[k].shape == (12, 768))
    shown = {
        "batch, rows × tokens": ((ROWS, TOKENS), rules("batch", None)),
        "MLP kernel, 768 × 3072": (
            parameters[kernel].shape,
            parameters[kernel].sharding.spec,
        ),
        "biases of the keys, 12 × 768": (
            parameters[bias].shape,
            parameters[bias].sharding.spec,
        ),
    }
    for ax, (title, (shape, spec)) in zip(line, shown.items(), strict=True):
        draw(ax, shape, jax.NamedSharding(mesh, spec))
        ax.set_title(title, size=9)
    line[0].set_ylabel(name, size=9)
plt.show()

# %% [markdown]
# Rows are split over `data` and `fsdp` alike, so each device has its own images; only
# devices along `tensor` share them. A kernel is whole on every device with `data`
# alone; `fsdp` cuts it along the width, `tensor` along its hidden units. Small arrays
# are copied, except where `tensor` cuts them with their heads.
#
# This decides how much memory the parameters need. AdamW keeps two moments for each
# parameter, so a device holds three float32 numbers for each one in its part:

# %%
print(f"{'mesh':26}{'parameters':>12}{'on a device':>13}{'with moments':>15}")
held = {}
for name, config in MESHES.items():
    mesh, _, parameters = abstract(config)
    total = mine = 0
    for leaf in parameters.values():
        total += leaf.size
        shard = jax.NamedSharding(mesh, leaf.sharding.spec).shard_shape(leaf.shape)
        mine += np.prod(shard, dtype=int)
    held[name] = mine
    line = f"{name:26}{total / 1e6:10.1f} M{mine / 1e6:11.1f} M"
    print(f"{line}{mine * 12 / 2**20:11.0f} MiB")
assert held["data 8"] == total and held["fsdp 8"] < total / 7

# %% [markdown]
# ## A slice that you do not have
#
# `navit compile` compiles the real training step with the TPU's own compiler for a
# slice that need not exist. It reports whether the step fits, and what the devices send
# to each other. It needs libtpu (`pip install 'jax[tpu]'`), but no TPU. `--quick`
# reports memory and communication; without it the compiler also schedules the step,
# which takes longer and gives its time.
#
# The next cell compiles B/16 with both towers for four v6e chips. If libtpu is missing,
# it shows the output that is stored in the repository, and says so.

# %%
import importlib.util
import json

COMMAND = """navit compile configs/siglip2_b16_naflex.py --topology v6e:2x2 --quick
    --json runs/notebook_05.json mesh.data=1 mesh.fsdp=4 data.rows=64"""

if importlib.util.find_spec("libtpu"):
    Path("runs").mkdir(exist_ok=True)
    done = subprocess.run(COMMAND.split(), capture_output=True, text=True)
    print(done.stdout, done.stderr * (done.returncode != 0))
    done.check_returncode()
    (report,) = json.loads(Path("runs/notebook_05.json").read_text())
    memory = report["memory"]
    assert report["fits"] and memory["peak"] < memory["limit"] / 4
else:
    print("libtpu is missing; this is the output that the repository stores:\n")
    stored = json.loads(Path("notebooks/05_on_a_pod.ipynb").read_text())
    (cell,) = (
        c
        for c in stored["cells"]
        if "navit compile configs" in "".join(c["source"]) and c["cell_type"] == "code"
    )
    print("".join(cell["outputs"][0]["text"]))

# %% [markdown]
# Read it from the top: the peak is far below the limit, so the batch can grow. The exit
# code is 1 if a step does not fit, so a script can search for the largest batch. Every
# weight is gathered for the forward and again for the backward pass; gradients are
# reduced and scattered once. [docs/sharding.md](../docs/sharding.md) has tables for
# slices up to 16 × 16.
#
# ## Several hosts
#
# On several hosts, run the same command on each, with a work directory that all of them
# share:
#
# ```sh
# navit train configs/siglip2_b16_naflex.py --workdir /shared/run mesh.fsdp=8
# ```
#
# On a Cloud TPU slice, in GKE, under Slurm and Open MPI the processes find one another.
# Elsewhere, `--coordinator`, `--processes` and `--process` name them. Two processes on
# this machine do for a rehearsal. Each has two simulated devices, the mesh spans all
# four, and each process decodes half of the rows:

# %%
import shutil
import socket

with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
shutil.rmtree("runs/notebook_05", ignore_errors=True)
command = f"""navit train configs/quickstart.py --workdir runs/notebook_05
    --coordinator localhost:{port} --processes 2 --process %d
    mesh.data=2 mesh.fsdp=2 train.steps=3 optim.warmup_steps=1
    train.log_every=1 train.checkpoint_every=3
    model.vision.width=64 model.text.width=64 data.rows=4 data.row_tokens=144
    data.train.size=200 data.eval.size=8 eval.budgets=64"""
devices = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
processes = [
    subprocess.Popen(
        (command % index).split(),
        env=devices,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for index in range(2)
]
outputs = [process.communicate(timeout=300)[0] for process in processes]
for index, output in enumerate(outputs):
    lines = [x for x in output.splitlines() if not x.startswith("[Gloo]")]
    print(f"process {index}:", *lines[:9], sep="\n")
assert [process.returncode for process in processes] == [0, 0]

# %% [markdown]
# Process 0 reports, and both stop together. If one is killed, the same command resumes
# from the latest checkpoint, on any number of hosts that divides the rows.
# [docs/pods.md](../docs/pods.md) describes checkpoints, interruptions and logs.
