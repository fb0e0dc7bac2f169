"""A training step lowers for CUDA on a machine without a GPU."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from navit import config as config_lib
from navit.batch import Batch, PackedImages
from navit.model import attention
from navit.sharding import Rules
from navit.train.optim import make_optimizer
from navit.train.state import init_state
from navit.train.step import make_train_step

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.py"


@pytest.mark.parametrize("implementation", ["auto", "xla", "blocks"])
def test_the_quickstart_lowers_for_cuda(implementation, monkeypatch):
    for module in ("attention", "layers", "encoder", "vision"):
        monkeypatch.setattr(f"navit.model.{module}.platform", lambda: "gpu")
    options = [f"model.attention={implementation}", "model.vision.depth=1"]
    config = config_lib.load(QUICKSTART, options)
    data = config.data
    b, n, s = data.rows, data.row_tokens, data.slots
    array = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    patches = jax.ShapeDtypeStruct((b, n, 768), np.uint8)
    batch = Batch(
        images=PackedImages(patches, array((b, n)), array((b, n, 2)), array((b, s, 2))),
        text=array((b, s, config.model.text.length)),
        owner=array((b, s)),
        label=array((b, s)),
        id=None,
        size=array((b, s, 2)),
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = jax.eval_shape(functools.partial(init_state, config, optimizer, Rules()))
    traced = make_train_step(config, optimizer, Rules()).trace(state, batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # "auto" computes in bfloat16, as on every accelerator, and takes the dense mask.
    assert "bf16" in text
    heads = config.model.vision.num_heads
    assert (f"{b}x{heads}x{n}x{n}xf32" in text) == (implementation != "blocks")


def test_a_gpu_takes_the_dense_mask_by_default():
    assert attention.choice("gpu", 1024, 768) == "xla"
