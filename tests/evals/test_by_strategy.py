"""An evaluation by the strategy that a model was trained with."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

from navit.config import EvalTask, override
from navit.embed import Embedder
from navit.evals import budgets, results, vectors
from navit.evals.row import origin, series
from navit.evals.tasks import open_tasks
from navit.model.two_tower import TwoTower
from navit.sources.synthetic import SyntheticSource

TASKS = (EvalTask("fine", "zero_shot"), EvalTask("retrieval"))


@pytest.fixture(scope="module")
def embedder():
    config = override(
        tiny_config(),
        [
            "data.strategy=internvl:64",
            "data.strategy.patch=16",
            "data.strategy.max_tiles=4",
            "data.budgets=256",
            "data.row_tokens=64",
        ],
    )
    return Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=7)


def evaluate(embedder, *overrides, cache=None):
    config = override(embedder.config, overrides)
    tasks = dataclasses.replace(config.eval, tasks=TASKS)
    config = dataclasses.replace(config, eval=tasks)
    opened = open_tasks(config)
    budgets.check(config, opened)
    moved = Embedder(embedder.model, config, step=embedder.step)
    return budgets.evaluate(
        moved, config, opened, trained=embedder.config, cache=cache
    ).rows


def test_a_model_is_evaluated_once_by_its_strategy(embedder, tmp_path):
    rows = evaluate(embedder, cache=tmp_path)
    strategy, source = embedder.config.data.strategy, SyntheticSource(12, 1)
    tokens = [
        sum(np.prod(view.grid) for view in strategy.views(*size))
        for size in source.sizes.tolist()
    ]
    assert [row["set"] for row in rows] == ["fine", "retrieval"]
    for row in rows:
        assert row["budget"] == max(tokens)
        assert row["tokens_per_image"] == round(float(np.mean(tokens)), 1)
        assert row["strategy"] == "internvl:tile=64,max_tiles=4,patch=16"
        assert row["notes"][0] == f"views by {row['strategy']}"
        assert row["settings"]["strategy"]["max_tiles"] == 4
    again = evaluate(embedder, cache=tmp_path)
    assert {row["images_per_second"] for row in again} == {None}  # all was kept
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]


def test_its_vectors_are_those_of_embed_images(embedder):
    source = SyntheticSource(12, 1)
    found = vectors.embed(embedder, source, 12, 64, folder=None).pooled
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    images = [source.record(i).image for i in range(12)]
    expected = embedder.embed_images(images)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_another_way_of_evaluating_is_noted(embedder):
    for overrides, note in (
        (["data.strategy=none", "data.budgets=64"], "and evaluated without it"),
        (["data.strategy.max_tiles=2"], "trained by internvl:tile=64,max_tiles=4"),
    ):
        rows = evaluate(embedder, *overrides)
        assert any(note in line for row in rows for line in row["notes"])


def test_rows_by_a_strategy_are_lines_of_their_own_and_have_no_pages(
    embedder, tmp_path
):
    rows = evaluate(embedder)
    plain = evaluate(embedder, "data.strategy=none", "data.budgets=64")
    for one in rows:
        for other in plain:
            assert series(one) != series(other)
    assert origin(rows[0]).endswith("strategy internvl:tile=64,max_tiles=4,patch=16")
    asked = []
    results.write(tmp_path, [*rows, *plain], [], lambda b: asked.append(b) or [])
    assert asked == sorted({row["budget"] for row in plain})
