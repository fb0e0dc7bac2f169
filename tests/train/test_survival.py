"""Runs that survive: averages of the weights, bad batches, a platform's notice."""

import argparse
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from test_loop import interrupt_at, logged, restored

import navit
from navit import commands
from navit.config import override
from navit.evals import vectors
from navit.input import pipeline
from navit.sharding import Rules, make_mesh, split_rows, use_mesh
from navit.sources.kinds import open_source
from navit.train import loop
from navit.train import step as step_lib
from navit.train.checks import changes, rounding_changes
from navit.train.interruption import Interruption, Outcome
from navit.train.optim import make_optimizer
from navit.train.state import init_state

# With the settings of this file, so that its runs share a program.
OPTIONS = [
    "optim.ema=0.7",
    "optim.name=muon",
    "optim.schedule=wsd",
    "optim.layer_decay=0.9",
    "train.on_nonfinite=skip:1",
    "eval.budgets=16",
]
BAD = -7


def config_of(*options):
    return override(tiny_config(), [*OPTIONS, *options])


@pytest.fixture
def bad(monkeypatch):
    """Makes the batches of these steps bad: their loss is NaN."""
    steps, real = set(), pipeline.train_batches
    real_loss = step_lib.batch_loss

    def batches(config, source, *, start_step=0, **kwargs):
        found = real(config, source, start_step=start_step, **kwargs)
        for i, batch in enumerate(found, start_step + 1):
            if i in steps:
                label = batch.label.copy()
                label[0, 0] = BAD
                batch = batch._replace(label=label)
            yield batch

    def loss(model, batch, *others):
        value, parts = real_loss(model, batch, *others)
        return jnp.where(batch.label[0, 0] == BAD, jnp.nan, value), parts

    monkeypatch.setattr(pipeline, "train_batches", batches)
    monkeypatch.setattr(step_lib, "batch_loss", loss)
    return steps


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_survives_bad_batches_and_signals_to_the_bit(bad, tmp_path, caplog):
    """One bad update is left out, the second ends the run, and nothing is lost."""
    config, bad_step = config_of(), 3
    bad.add(bad_step)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        assert loop.train(config, tmp_path / "cut") is Outcome.PREEMPTED
    at_four = restored(tmp_path / "cut", config)
    assert int(at_four.skipped) == 1
    assert loop.train(config, tmp_path / "cut") is Outcome.DONE
    assert loop.train(config, tmp_path / "whole") is Outcome.DONE
    state = restored(tmp_path / "whole", config)
    assert_equal(state, restored(tmp_path / "cut", config))
    assert int(state.step) == 6 and int(state.skipped) == 1
    assert (
        f"at step {bad_step}: this update is left out (1 of at most 1)" in caplog.text
    )
    lines = logged(tmp_path / "whole")
    assert [x["skipped"] for x in lines if "loss" in x] == [0, 1, 1]
    # The average is what is loaded, evaluated and exported.
    assert_equal(navit.load(tmp_path / "whole").model, state.ema)
    assert_equal(navit.load(tmp_path / "whole", raw=True).model, state.model)
    navit.save(navit.load(tmp_path / "whole"), tmp_path / "out", "navit")
    assert_equal(navit.load(tmp_path / "out").model, state.ema)
    rows = json.loads((tmp_path / "whole/budgets.json").read_text())["rows"]
    again = vectors.fingerprint(navit.load(tmp_path / "whole"))
    assert {row["weights"] for row in rows} == {again}

    bad.add(5)
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tmp_path / "stopped")
    message = str(error.value)
    assert "the loss is nan" in message and "at step 5: lower optim.lr" in message
    assert "step 3 is saved" in message and "\n" not in message
    kept = tmp_path / "stopped/nonfinite"
    assert_equal(restored(kept, config), at_four)
    notes = [json.loads(x) for x in (kept / "batches.jsonl").read_text().splitlines()]
    source = open_source(config.data.train)
    planned = list(pipeline.train_batches(config, source))
    for note, step in zip(notes, (3, 5), strict=True):
        ids = planned[step - 1].id
        assert note["step"] == step and note["loss"] == "nan"
        assert note["ids"] == sorted(ids[ids >= 0].tolist())
    # The data has changed, and the run goes on from its last checkpoint.
    bad.discard(5)
    assert loop.train(config, tmp_path / "stopped") is Outcome.DONE
    assert_equal(restored(tmp_path / "stopped", config), state)


def test_the_average_is_that_of_the_weights_and_lies_where_they_lie():
    config = config_of("mesh.data=2", "mesh.fsdp=4", "model.vision.width=32")
    config = override(config, ["model.text.width=32", "data.rows=8"])
    mesh, rules = make_mesh(config.mesh)
    source = pipeline.open_source(config.data.train)
    with use_mesh(mesh):
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = jax.jit(lambda: init_state(config, optimizer, rules))()
        expected = jax.tree.map(np.asarray, state.ema)
        step = step_lib.make_train_step(config, optimizer, rules)
        batches = pipeline.train_batches(config, source)
        for t, batch in zip(range(1, 4), batches, strict=False):
            state, _ = step(state, split_rows(batch, rules))
            decay = min(0.7, (1 + t) / (10 + t))
            expected = jax.tree.map(
                lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p),
                expected,
                state.model,
            )
        assert step._cache_size() == 1
    for a, p, e in zip(
        *map(jax.tree.leaves, (state.ema, state.model, expected)), strict=True
    ):
        assert a.sharding == p.sharding
        np.testing.assert_allclose(a, e, atol=1e-6)


def test_on_nonfinite_may_change_and_is_recorded():
    before, now = config_of(), config_of("train.on_nonfinite=stop")
    assert not changes(before, now)
    assert rounding_changes(before, now) == ["train.on_nonfinite: 'skip:1' -> 'stop'"]
    assert changes(before, config_of("optim.ema=0.8"))


@pytest.mark.parametrize(
    "outcome, status, status_if_sigterm_fails",
    [
        (Outcome.DONE, 0, 0),
        (Outcome.PREEMPTED, 0, 143),
        (Outcome.INTERRUPTED, 130, 130),
    ],
)
def test_exit_codes(outcome, status, status_if_sigterm_fails, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "train", lambda *_: outcome)
    args = argparse.Namespace(
        config="configs/quickstart.py",
        overrides=[],
        print_config=False,
        debug=True,
        workdir=tmp_path,
        coordinator=None,
        processes=1,
        process=None,
        fail_on_sigterm=False,
    )
    assert commands.train(args) == status
    args.fail_on_sigterm = True
    assert commands.train(args) == status_if_sigterm_fails


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(first):
    with Interruption() as interruption:
        assert interruption.outcome() is Outcome.DONE
        os.kill(os.getpid(), first)
        is_term = first == signal.SIGTERM
        expected = Outcome.PREEMPTED if is_term else Outcome.INTERRUPTED
        assert interruption.after(1) and interruption.outcome() is expected
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_no_average_costs_nothing():
    config = tiny_config()
    optimizer = make_optimizer(config.optim, 6)
    state = jax.eval_shape(lambda: init_state(config, optimizer, Rules()))
    assert state.ema is None and state.best is state.model
