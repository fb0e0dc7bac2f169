"""Every config loads, builds, and gives a batch that its model takes."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from navit import config as config_lib
from navit.batch import Batch, PackedImages
from navit.input import pipeline
from navit.plan.batches import BatchPlans
from navit.sharding import Rules
from navit.train.optim import make_optimizer, make_schedule
from navit.train.state import init_state
from navit.train.step import make_train_step

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_builds_and_pulls_one_batch(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])  # data/sample is named from there
    config = config_lib.load(path)
    small = {"data.rows": min(config.data.rows, 8)}
    if hasattr(config.data.train, "size"):
        small["data.train.size"] = 200
    elif not config.data.train.path:  # the user's
        small["data.train.path"] = "data/sample"
    if config.model.text.tokenizer != "bytes":  # the user's
        small["model.text.tokenizer"] = "bytes"
    config = config_lib.override(config, [f"{k}={v}" for k, v in small.items()])
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = jax.eval_shape(functools.partial(init_state, config, optimizer, Rules()))
    source = pipeline.open_source(config.data.train)
    batch = next(pipeline.train_batches(config, source))
    batch.images.check()
    assert (batch.images.grids > 0).any()
    step = make_train_step(config, optimizer, Rules())
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()
    assert len(pipeline.open_eval_source(config.data)) > 0


def axes(x: jax.ShapeDtypeStruct) -> list:
    """The mesh axes of each array axis, up to the last axis that has any."""
    found = list(x.sharding.spec) if x.sharding is not None else []
    while found and found[-1] is None:
        found.pop()
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_lowers_for_a_pod(path):
    """The whole step on 256 abstract chips, for TPU: shapes, shardings, lowering."""
    mesh = jax.sharding.AbstractMesh(
        (64, 4), ("data", "fsdp"), (jax.sharding.AxisType.Explicit,) * 2
    )
    rules = Rules(("data", "fsdp"), "fsdp")
    # The defaults of a CPU are not those of a TPU.
    options = ["model.dtype=bfloat16", "model.attention=xla"]
    config = config_lib.override(config_lib.load(path), options)
    data, text = config.data, config.model.text
    rows = math.ceil(data.rows / mesh.size) * mesh.size
    patch = config.model.vision.patch_size**2 * 3
    sharding = jax.NamedSharding(mesh, rules("batch"))

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    n, s = data.row_tokens, data.slots
    patches = array(n, patch, dtype="uint8")
    images = PackedImages(patches, array(n), array(n, 2), array(s, 2))
    batch = Batch(
        images=images,
        text=array(s, text.length),
        owner=array(s),
        label=array(s),
        id=None,
        size=array(s, 2),
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(functools.partial(init_state, config, optimizer, rules))
        traced = make_train_step(config, optimizer, rules).trace(state, batch)
        lowered = traced.lower(lowering_platforms=("tpu",))
    after, _ = traced.out_info
    assert any("fsdp" in axes(x) for x in jax.tree.leaves(state.opt_state))
    for (path_, x), y in zip(
        jax.tree_util.tree_flatten_with_path(state)[0],
        jax.tree.leaves(after),
        strict=True,
    ):
        where = jax.tree_util.keystr(path_)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        assert axes(x) == axes(y), where
    assert "stablehlo.dot_general" in lowered.as_text()


def test_the_naflex_stage_is_that_of_the_paper():
    """SigLIP 2 sections 2.1 and 2.4.2, in numbers."""
    for name, width in (("b16", 768), ("so400m16", 1152)):
        path = CONFIGS[0].parent / f"siglip2_{name}_naflex.py"
        config = config_lib.load(path)
        assert config.model.vision.width == config.model.text.width == width
        assert config.data.budgets == (128, 256, 576, 784, 1024)
        sizes = np.random.default_rng(0).integers(300, 900, (20_000, 2))
        one = dataclasses.replace(config.data, rows=config.data.caption_rows)
        plans = BatchPlans(sizes, one, patch_size=16, steps=1)
        used, left_out = plans.first_block()
        batch = config.data.rows * len(used.index) / len(used)
        assert abs(batch / 32_768 - 1) < 0.02
        assert plans.captions_filled(used) > 0.9 and left_out < 0.0005
        assert config.data.rows % (256 * config.data.caption_rows) == 0
        whole = 40e9 / 32_768
        assert abs(config.train.steps / (whole * 0.1 * 3.75) - 1) < 1e-4
        schedule = make_schedule(config.optim, config.train.steps)
        # The cosine is at 90 % where the run starts, and at its end where it ends.
        assert abs(float(schedule(0)) / 1e-3 - (1 + math.cos(0.9 * math.pi)) / 2) < 1e-3
        assert float(schedule(config.train.steps)) < 1e-9
