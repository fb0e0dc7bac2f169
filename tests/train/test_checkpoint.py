"""Checkpoints on disk: damaged ones are named, and intact ones are kept."""

import contextlib
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from navit.config import override, to_json
from navit.sharding import Rules
from navit.train import checksums
from navit.train.checkpoint import FORMAT, Checkpoints
from navit.train.checks import changes
from navit.train.optim import make_optimizer
from navit.train.state import init_state
from navit.train.workdir import outdated, steps

CONFIG = tiny_config()


def make_state():
    optimizer = make_optimizer(CONFIG.optim, CONFIG.train.steps)
    return init_state(CONFIG, optimizer, Rules())


@pytest.fixture(scope="module")
def state():
    return jax.jit(make_state)()


def write(workdir, state, *steps, **kwargs):
    checkpoints = Checkpoints(workdir, **{"keep": 2, **kwargs})
    for step in steps:
        checkpoints.save(state._replace(step=jnp.int32(step)), CONFIG, "data")
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A work directory of steps 1 to 3, of which it keeps two."""
    workdir = tmp_path_factory.mktemp("checkpoints") / "run"
    write(workdir, state, 1, 2, 3)
    return workdir


def test_a_damaged_checkpoint_without_checksums_is_one_error(saved, tmp_path):
    """As format 2 wrote them: nothing shows the damage before it is read."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    folder = workdir / "checkpoints/3"
    (folder / checksums.NAME).unlink()
    about = folder / "about/metadata"
    about.write_text(about.read_text().replace(f'"format": {FORMAT}', '"format": 2'))
    for file in (folder / "model").rglob("*"):
        if file.is_file():
            truncate(file)
    checkpoints = Checkpoints(workdir)
    assert checkpoints.set_damaged_aside() == 3
    like = jax.eval_shape(make_state)
    with pytest.raises(
        ValueError, match=r"step 3 of .* cannot be read \(.*\): move"
    ) as e:
        checkpoints.restore_model(like.model)
    assert "\n" not in str(e.value)
    about.write_text(about.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ValueError, match="format 1"):
        Checkpoints(workdir).config()


def files_of(workdir, step=3):
    folder = workdir / "checkpoints" / str(step)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(found) > 10
    return found


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip(file):
    data = bytearray(file.read_bytes())
    bit = np.random.default_rng(len(data)).integers(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def remove(file):
    file.unlink()


def test_a_saved_state_is_restored(saved, state):
    checkpoints = Checkpoints(saved)
    found = checkpoints.restore(jax.eval_shape(make_state))
    assert checkpoints.config() == CONFIG and checkpoints.data() == "data"
    checkpoints.close()
    assert int(found.step) == 3
    assert sorted(x.name for x in (saved / "checkpoints").iterdir()) == ["2", "3"]
    expected = state._replace(step=jnp.int32(3))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_kth_checkpoint_stays(state, tmp_path):
    write(tmp_path, state, *range(1, 8), keep=1, keep_every=3)
    assert steps(tmp_path / "checkpoints") == [3, 6, 7]
    assert outdated([2, 3, 4, 5], 2, None) == [2, 3]
    with pytest.raises(ValueError, match=r"keep_every=4 is not a multiple of .*=3, so"):
        override(CONFIG, ["train.keep_every=4"])
    assert not changes(CONFIG, override(CONFIG, ["train.keep_every=6"]))
    several = ["train.keep_every=8", "train.checkpoint_every=4"]
    assert override(CONFIG, several).train.keep_every == 8


@pytest.mark.parametrize("loss", ["sigmoid", "softmax", "classification"])
def test_a_config_saved_with_one_loss_is_the_same_config(loss, saved, tmp_path):
    """As format 3 had it before `train.losses`, and format 2."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    classes = "model.vision.num_classes=7"
    config = override(CONFIG, [classes, f"train.losses={loss}"])
    if loss == "sigmoid":
        config = override(config, ["train.losses.sigmoid.implementation=ring"])
    data = to_json(config)
    implementation = data["train"].pop("losses")[0].get("implementation", "auto")
    data |= {"init": ""}  # now None
    data["train"] |= {"loss": loss, "loss_implementation": implementation}
    about = workdir / "checkpoints/3/about/metadata"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"config": data}))
    checksums.write(workdir / "checkpoints/3")
    checkpoints = Checkpoints(workdir)
    assert checkpoints.config() == config
    assert not changes(checkpoints.config(), config)
    checkpoints.close()


@pytest.mark.parametrize("damage", [truncate, zero, flip, remove])
def test_a_damaged_checkpoint_is_named_and_training_uses_the_one_before(
    damage, saved, tmp_path, caplog
):
    """Reading needs only the files of what is read; training needs all."""
    like = jax.eval_shape(make_state).model
    for i, original in enumerate(files_of(saved)):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        name = original.relative_to(saved / "checkpoints/3").as_posix()
        damage(workdir / "checkpoints/3" / name)
        checkpoints = Checkpoints(workdir)
        folder, in_folder, _ = name.partition("/")
        for part, read in (
            ("about", checkpoints.config),
            ("model", lambda c=checkpoints: c.restore_model(like)),
        ):
            is_read = folder == part or not in_folder
            if name == checksums.NAME and damage in (truncate, flip):
                continue  # it may lack lines of other parts only
            if not is_read and damage is not remove:
                continue  # what is not read may be damaged in any way
            message = r"step 3 of .* is damaged \(.*\): navit t"
            error = pytest.raises(ValueError, match=message)
            with error if is_read else contextlib.nullcontext():
                read()
        assert (workdir / "checkpoints/3").is_dir()  # reading moves nothing
        caplog.clear()
        assert checkpoints.set_damaged_aside() == 2
        assert "step 3 is damaged (" in caplog.text
        assert "): resuming from step 2" in caplog.text
        assert checkpoints.data() == "data"
        checkpoints.close()
        assert (workdir / "damaged/3").is_dir()
        shutil.rmtree(workdir)


def test_a_model_is_read_beside_a_damaged_optimizer(saved, state, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for file in (workdir / "checkpoints/3/opt_state").rglob("*"):
        if file.is_file():
            zero(file)
    checkpoints = Checkpoints(workdir)
    like = jax.eval_shape(make_state)
    model, step = checkpoints.restore_model(like.model)
    assert step == 3 and checkpoints.config() == CONFIG
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"step 3 of .* is damaged \(opt_state/"):
        checkpoints.restore(like)
    checkpoints.close()


def test_a_stray_empty_step_is_set_aside(saved, tmp_path, caplog):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for _ in range(2):
        (workdir / "checkpoints/7").mkdir()
        checkpoints = Checkpoints(workdir)
        assert checkpoints.set_damaged_aside() == 3
        checkpoints.close()
    assert "step 7 is damaged (SHA256SUMS is missing): resuming from step 3" in (
        caplog.text
    )
    assert {x.name for x in (workdir / "damaged").iterdir()} == {"7", "7.1"}


def test_training_does_not_start_over_if_no_checkpoint_is_intact(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for step in (2, 3):
        zero(files_of(workdir, step)[-1])
    checkpoints = Checkpoints(workdir)
    with pytest.raises(ValueError, match="and no earlier checkpoint is intact"):
        checkpoints.set_damaged_aside()
    checkpoints.close()
    assert (workdir / "checkpoints/3").is_dir()


def test_values_that_are_not_finite_are_refused_by_name(state, tmp_path):
    model = jax.tree.map(lambda x: x, state.model)
    model.vision.head.probe[...] = model.vision.head.probe[...].at[0, 3].set(jnp.nan)
    write(tmp_path, state._replace(model=model), 1)
    checkpoints = Checkpoints(tmp_path)
    like = jax.eval_shape(make_state)
    for restore in (
        lambda: checkpoints.restore(like),
        lambda: checkpoints.restore_model(like.model),
    ):
        with pytest.raises(ValueError, match=r"s/1: model.vision.head.probe is NaN"):
            restore()
    checkpoints.close()


def test_a_full_disk_is_a_one_line_error_that_names_the_safe_step(
    state, tmp_path, monkeypatch
):
    write(tmp_path, state, 1)

    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(checksums, "write", full)
    with pytest.raises(
        OSError, match=r"/2 \(No space left on device\); step 1 is safe"
    ):
        write(tmp_path, state, 2)
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1 and checkpoints.data() == "data"
    checkpoints.close()
    write(tmp_path, state, 2)  # the partial checkpoint is not in the way
    assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
