"""Every config loads, builds, and gives a batch that its model takes."""

import functools
from pathlib import Path

import jax
import pytest

from navit import config as config_lib
from navit.input import pipeline
from navit.optim import make_optimizer
from navit.sharding import Rules
from navit.train.state import init_state
from navit.train.step import make_train_step

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_builds_and_pulls_one_batch(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])  # data/sample is named from there
    config = config_lib.load(path)
    small = {"data.train.size": 200} if hasattr(config.data.train, "size") else {}
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
