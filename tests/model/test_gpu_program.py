"""Training steps lower for CUDA on a machine without a GPU, over eight devices."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from navit import config as config_lib
from navit import sharding
from navit.batch import Batch, PackedImages
from navit.model import attention
from navit.model.layers import compute_dtype
from navit.sharding import Rules, platform
from navit.train.checks import check_devices
from navit.train.optim import make_optimizer
from navit.train.state import init_state
from navit.train.step import make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    "name, implementation, fsdp",
    [
        ("quickstart", "auto", 1),
        ("quickstart", "blocks", 1),
        ("quickstart", "flash", 8),
        ("siglip2_b16_naflex", "auto", 8),
        ("siglip2_b16_naflex", "flash", 1),
    ],
)
def test_a_step_lowers_for_cuda(name, implementation, fsdp):
    options = [f"model.attention={implementation}", "model.vision.depth=1"]
    options += ["model.text.depth=1", "data.rows=64"]
    config = config_lib.load(CONFIGS / f"{name}.py", options)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.sharding.AbstractMesh(
        (8 // fsdp, fsdp), ("data", "fsdp"), explicit, abstract_device=H100
    )
    rules = Rules(("data", "fsdp"), embed="fsdp" if fsdp > 1 else None)
    data = config.data
    b, n, s = data.rows, data.row_tokens, data.slots
    array = functools.partial(
        jax.ShapeDtypeStruct,
        dtype=np.int32,
        sharding=jax.NamedSharding(mesh, rules("batch")),
    )

    def place(x):
        spec = jax.P() if x.sharding is None else x.sharding.spec
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    groups = b // (data.caption_rows or 1)
    batch = Batch(
        images=PackedImages(
            array((b, n, 768), dtype=np.uint8),
            array((b, n)),
            array((b, n, 2)),
            array((b, s, 2)),
        ),
        text=array((groups, b // groups * s, config.model.text.length)),
        owner=array((b, s)),
        label=array((b, s)),
        id=None,
        size=array((b, s, 2)),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "gpu"
        optimizer = make_optimizer(config.optim, config.train.steps)
        make_state = functools.partial(init_state, config, optimizer, rules)
        state = jax.tree.map(place, jax.eval_shape(make_state))
        traced = make_train_step(config, optimizer, rules).trace(state, batch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # It computes in bfloat16, as on every accelerator. By default it takes the dense
    # mask, on each device for its own rows.
    assert "bf16" in text
    heads, rows = config.model.vision.num_heads, b // 8
    assert (f"{rows}x{heads}x{n}x{n}xf32" in text) == (implementation == "auto")
    for kernel in ("flash_forward", "flash_backward"):
        assert (kernel in text) == (implementation == "flash")


@pytest.mark.parametrize("capability", ["7.5", "8.0"])
def test_a_gpu_older_than_ampere_computes_in_float32(capability, monkeypatch):
    class Gpu:
        compute_capability = capability

    old = capability == "7.5"
    monkeypatch.setattr(sharding.jax, "local_devices", lambda: [Gpu()])
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=H100)
    config = config_lib.load(CONFIGS / "quickstart.py", ["model.dtype=bfloat16"])
    with jax.sharding.use_abstract_mesh(mesh):
        assert compute_dtype("auto") == ("float32" if old else "bfloat16")
        assert compute_dtype("bfloat16") == "bfloat16"
        refused = pytest.raises(ValueError, match=r"this one has 7\.5: use model.dtype")
        with refused if old else contextlib.nullcontext():
            check_devices(config, Rules())
    assert compute_dtype("auto") == "float32"  # on a CPU


def test_a_gpu_takes_the_dense_mask_by_default():
    assert attention.choice("gpu", 1024, 768) == "xla"
