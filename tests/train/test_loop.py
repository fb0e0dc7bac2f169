"""Training runs: resume, interruption, refusals, and what they leave behind."""

import dataclasses
import errno
import json
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config
from PIL import Image

import navit
from navit.config import (
    EvalTask,
    Folder,
    MeshConfig,
    Mixture,
    Synthetic,
    Tfds,
    override,
)
from navit.evals import budgets
from navit.evals.tasks import open_tasks
from navit.input import pipeline
from navit.model.two_tower import TwoTower
from navit.sharding import Rules, make_mesh, use_mesh
from navit.sources.kinds import Opener, open_source
from navit.train import checkpoint, hosts, lock, loop
from navit.train.checkpoint import Checkpoints
from navit.train.checks import changes, check_captions, check_config
from navit.train.optim import make_optimizer
from navit.train.start import trained_model
from navit.train.state import init_state


def restored(workdir, config):
    optimizer = make_optimizer(config.optim, config.train.steps)
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(
        jax.eval_shape(lambda: init_state(config, optimizer, Rules()))
    )
    checkpoints.close()
    return state


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Sends this process a signal during `step`, while the next batch is read."""
    real = pipeline.train_batches

    def batches(config, source, *, start_step=0, **kwargs):
        for i, batch in enumerate(
            real(config, source, start_step=start_step, **kwargs), start_step + 1
        ):
            if i == step + 1:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", batches)


def test_interrupted_and_resumed_equals_never_having_stopped(
    uninterrupted, tmp_path, caplog
):
    """By either signal, one after the other."""
    caplog.set_level("INFO", "navit")
    config = tiny_config()
    stops = (2, signal.SIGINT, "interrupted"), (4, signal.SIGTERM, "preempted")
    for step, number, word in stops:
        handler = signal.getsignal(number)
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step, number)
            outcome = loop.train(config, tmp_path)
        assert not outcome and outcome.value == word
        assert f"{word}; saved step {step}" in caplog.text
        assert signal.getsignal(number) == handler
    assert loop.train(config, tmp_path)
    for step in (2, 4):
        assert f"resuming from step {step}" in caplog.text
    a, b = restored(uninterrupted, config), restored(tmp_path, config)
    assert int(a.step) == int(b.step) == 6
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_interrupted_after_the_last_step_does_not_evaluate(tmp_path, monkeypatch):
    config, save = tiny_config(), Checkpoints.save

    def interrupted(checkpoints, state, *args):
        if int(state.step) == config.train.steps:
            monkeypatch.setattr(Checkpoints, "save", save)
            os.kill(os.getpid(), signal.SIGINT)
        save(checkpoints, state, *args)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    assert not loop.train(config, tmp_path)
    assert not (tmp_path / "budgets.json").exists()
    assert loop.train(config, tmp_path)
    assert (tmp_path / "budgets.json").exists()


def test_killed_run_resumes_from_the_last_checkpoint(
    uninterrupted, tmp_path, monkeypatch
):
    """Steps logged after that checkpoint appear once in the end."""
    config = tiny_config()
    real = pipeline.train_batches

    def dying(*args, **kwargs):
        for i, batch in enumerate(real(*args, **kwargs), 1):
            if i == 6:
                raise MemoryError("killed")
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", dying)
    with pytest.raises(MemoryError):
        loop.train(config, tmp_path)
    steps = [line["step"] for line in logged(tmp_path)]
    assert steps == [2, 4]  # checkpoints: 3
    monkeypatch.undo()
    loop.train(config, tmp_path)
    steps = [line["step"] for line in logged(tmp_path)]
    assert steps == [2, 4, 6]
    a, b = restored(uninterrupted, config), restored(tmp_path, config)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    uninterrupted, tmp_path, caplog
):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    (workdir / "checkpoints/6/opt_state/manifest.ocdbt").unlink()
    assert navit.load(workdir).step == 6  # its model is intact
    assert loop.train(tiny_config(), workdir)
    assert "(opt_state/manifest.ocdbt is missing): resuming from step 3" in caplog.text
    a, b = restored(uninterrupted, tiny_config()), restored(workdir, tiny_config())
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert [x["step"] for x in logged(workdir)] == [2, 4, 6]


def test_metrics_are_those_of_the_uninterrupted_run(uninterrupted):
    lines = logged(uninterrupted)
    for line in lines:
        assert line["images_per_second"] > 0 and 0 < line["fill"] <= 1
        assert np.isfinite(line["loss"]) and line["unreadable"] == 0
    assert lines[-1]["eta_seconds"] == 0
    for name in ("config.json", "budgets.json", "budgets.png"):
        assert (uninterrupted / name).stat().st_size > 0
    assert not list(uninterrupted.glob(".*"))


def test_a_run_evaluates_as_it_trains(uninterrupted, tmp_path):
    """It logs the results, and training is that of a run that does not."""
    config = override(tiny_config(), ["eval.every=2", "eval.budgets=16"])
    assert loop.train(config, tmp_path)
    lines = logged(tmp_path)
    steps = [x["step"] for x in lines if "loss" in x]
    results = [x for x in lines if "loss" not in x]
    assert steps == [x["step"] for x in results] == [2, 4, 6]
    assert [x["loss"] for x in lines if "loss" in x] == [
        x["loss"] for x in logged(uninterrupted)
    ]
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert {row["step"] for row in rows} == {2, 4, 6}
    for row in rows:
        (line,) = (x for x in results if x["step"] == row["step"])
        for metric, value in row["metrics"].items():
            name = f"eval/{row['set']}/{row['kind']}/{row['budget']}/{metric}"
            assert line[name] == value


def test_finished_run_only_evaluates_again(uninterrupted, caplog):
    caplog.set_level("INFO", "navit")
    before = (uninterrupted / "metrics.jsonl").read_text()
    assert loop.train(tiny_config(), uninterrupted)
    assert "is already trained to step 6" in caplog.text
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_a_second_run_in_the_same_work_directory_is_refused(uninterrupted, tmp_path):
    with lock.held(tmp_path), pytest.raises(ValueError) as error:
        loop.train(tiny_config(), tmp_path)
    message = str(error.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, since" in message
    assert "choose another --workdir" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with lock.held(uninterrupted):
        assert navit.load(uninterrupted).step == 6


def test_a_run_with_init_finds_the_lock_before_it_touches_checkpoints(tmp_path):
    damaged = tmp_path / "checkpoints" / "3"
    damaged.mkdir(parents=True)
    with lock.held(tmp_path), pytest.raises(ValueError, match="is training in"):
        trained_model(tmp_path)
    with pytest.raises(ValueError, match=r"step 3 .* is damaged"):
        trained_model(tmp_path)
    assert damaged.exists()


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from navit.train import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])):\n"
        "    print(0, flush=True)\n"
        "    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(ValueError, match=rf"process {holder.pid} on"),
            lock.held(tmp_path),
        ):
            pass
        holder.kill()
    with lock.held(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock.held(tmp_path):
        assert "No locks available" in caplog.text


def test_checkpoint_of_another_config_is_refused(uninterrupted):
    changed = override(tiny_config(), ["optim.lr=0.5"])
    with pytest.raises(ValueError) as error:
        loop.train(changed, uninterrupted)
    message = str(error.value)
    assert "optim.lr: 0.001 -> 0.5" in message and "--workdir" in message
    assert "\n" not in message and "init=" not in message
    longer = override(tiny_config(), ["train.steps=100"])
    with pytest.raises(ValueError, match=f"train longer, set init={uninterrupted}"):
        loop.train(longer, uninterrupted)


def test_changed_data_is_refused(tmp_path):
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("file,caption\na.png,a\nb.png,b\n")
    data = [f"data.train.path={tmp_path}", "data.eval=none"]
    config = dataclasses.replace(
        tiny_config(),
        data=dataclasses.replace(tiny_config().data, train=Folder()),
    )
    config = override(config, data)
    assert loop.train(config, tmp_path / "run")
    for change in ("size", "caption", "order"):
        table, size = "file,caption\na.png,a\nb.png,b\n", (40, 30)
        if change == "size":
            size = (40, 31)
        elif change == "caption":
            table = table.replace(",b\n", ",c\n")
        else:
            table = "file,caption\nb.png,b\na.png,a\n"
        Image.new("RGB", size).save(tmp_path / "b.png")
        (tmp_path / "t.csv").write_text(table)
        with pytest.raises(
            ValueError, match=r"trained on 2 images .*put the data back"
        ):
            loop.train(config, tmp_path / "run")


def test_a_checkpoint_of_another_format_is_refused(uninterrupted, monkeypatch):
    monkeypatch.setattr("navit.train.checkpoint.FORMAT", 99)
    with pytest.raises(ValueError, match=r"from format 99: train into another"):
        navit.load(uninterrupted)


def test_the_previous_format_loads_but_does_not_resume(uninterrupted, monkeypatch):
    """Its model is the same; its optimizer is not."""
    monkeypatch.setattr("navit.train.checkpoint._SAME_MODEL", checkpoint.FORMAT)
    monkeypatch.setattr("navit.train.checkpoint.FORMAT", 99)
    assert navit.load(uninterrupted).step == 6
    with pytest.raises(
        ValueError, match=r"format 99: start from its weights with init=\S+"
    ):
        loop.train(tiny_config(), uninterrupted)


def test_the_first_step_is_logged_without_rates(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    assert not loop.train(tiny_config(log_every=1), tmp_path)
    first, second = logged(tmp_path)
    assert 0 < first["fill"] <= 1 and first["images_per_step"] > 1
    assert "images_per_second" not in first and second["images_per_second"] > 0


def test_unlikely_settings_are_warned_about(caplog):
    options = ["optim.warmup_steps=9", "model.text.length=6"]
    config = override(tiny_config(steps=2), options)
    check_config(config)
    check_captions(config, pipeline.open_source(config.data.train))
    assert "optim.warmup_steps=9 is more than train.steps=2" in caplog.text
    assert re.search(
        r"\d+\.\d % of the captions are longer than model.text.length=6", caplog.text
    )


def test_settings_that_do_not_affect_the_run_may_change(uninterrupted):
    config = override(
        tiny_config(), ["eval.budgets=4", "train.log_every=1", "data.workers=1"]
    )
    assert loop.train(config, uninterrupted)


def test_settings_that_affect_rounding_may_change_and_are_recorded(
    uninterrupted, tmp_path, caplog
):
    caplog.set_level("INFO", "navit")
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    options = [
        "mesh.gradients=bfloat16",
        "model.remat=full",
        "train.microbatches=2",
        "model.attention=xla",
        "model.fused=false",
        "model.scan_unroll=2",
        "train.losses.sigmoid.implementation=dense",
    ]
    config = override(tiny_config(), options)
    assert loop.train(config, workdir)
    (line,) = (workdir / "changes.jsonl").read_text().splitlines()
    recorded = json.loads(line)
    assert recorded["step"] == 3 and len(recorded["changes"]) == len(options)
    assert "from here on model.attention: 'auto' -> 'xla'" in caplog.text
    a, b = logged(uninterrupted)[-1], logged(workdir)[-1]
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
    assert not (uninterrupted / "changes.jsonl").exists()


@pytest.mark.parametrize(
    "option", ["data.rows=2", "model.vision.pool=mean", "optim.b1=0.8", "train.seed=1"]
)
def test_changes_to_the_model_or_its_data_are_refused(option):
    assert changes(tiny_config(), override(tiny_config(), [option]))


def test_only_the_location_of_the_data_may_change():
    def config(path, **options):
        source = Folder(path, **options)
        data = dataclasses.replace(tiny_config().data, train=Mixture((source,)))
        return dataclasses.replace(tiny_config(), data=data)

    before = config("/mnt/a")
    assert not changes(before, config("/mnt/b", table="t.csv"))
    assert changes(before, config("/mnt/b", split="train"))
    for source, other in (
        (Folder("/mnt/a"), Folder("/mnt/b")),
        (Tfds("a", data_dir="/mnt/a"), Tfds("a", data_dir="/mnt/b")),
        (Tfds("a"), Tfds("a", caption="caption", label="")),
    ):
        one, two = (
            dataclasses.replace(before, data=dataclasses.replace(before.data, train=x))
            for x in (source, other)
        )
        assert not changes(one, two) and changes(one, before)


def test_only_the_towers_that_a_run_has_count_and_not_where_they_came_from():
    now = override(tiny_config(), ["init=a", "init_towers=true"])
    assert not changes(override(now, ["init_towers=false"]), now)


def test_other_data_in_another_process_is_refused(tmp_path, monkeypatch):
    asked = []

    def check_same(what, value):
        asked.append(value)
        if what == "data.train":
            raise ValueError("data.train of processes [1] is not that of process 0")

    monkeypatch.setattr(hosts, "check_same", check_same)
    with pytest.raises(ValueError, match=r"data\.train of processes"):
        loop.train(tiny_config(), tmp_path)
    data = tiny_config().data
    assert asked[-1] == pipeline.fingerprint(open_source(data.train), data)


def test_load_gives_the_trained_model(uninterrupted):
    model = navit.load(uninterrupted)
    assert model.step == 6 and model.config == tiny_config()
    state = restored(uninterrupted, tiny_config())
    for a, b in zip(
        jax.tree.leaves(model.model), jax.tree.leaves(state.model), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_embedding_on_a_mesh_equals_one_device(uninterrupted):
    images = [np.full((20 + 9 * i, 90, 3), 17 * i, np.uint8) for i in range(11)]
    texts = [f"text {i}" for i in range(5)]
    one = navit.load(uninterrupted)
    expected = one.embed_images(images, 36), one.embed_texts(texts)
    mesh, rules = make_mesh(MeshConfig(data=4, fsdp=2))
    with use_mesh(mesh):
        model = navit.load(uninterrupted, rules=rules)
        found = model.embed_images(images, 36), model.embed_texts(texts)
        kernel = model.vision.encoder.blocks.mlp.up.kernel[...]
    assert not kernel.sharding.is_fully_replicated
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_embedding_without_upscaling_packs_and_changes_nothing(uninterrupted):
    """Without upscaling several images share a row, and each is as if alone."""
    model = navit.load(uninterrupted)
    model.config = override(model.config, ["data.max_upscale=1.0"])
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        for h, w in [(16, 16), (50, 20), (300, 200), (32, 32), (17, 64), (400, 30)]
    ]
    together = model.embed_images(images, 36)
    for image, vector in zip(images, together, strict=True):
        np.testing.assert_allclose(
            model.embed_images([image], 36)[0], vector, atol=1e-5
        )


def test_embedding_enlarges_to_min_tokens_as_training_does(uninterrupted):
    model = navit.load(uninterrupted)
    small = [np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)]
    enlarged = model.embed_images(small, 16)
    floor = ["data.max_upscale=1.0", "data.min_tokens=16", "data.budgets=16,"]
    model.config = override(model.config, floor)
    # In a longer row, so compiled again.
    np.testing.assert_allclose(model.embed_images(small, 36), enlarged, atol=1e-5)


def test_load_of_something_else_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a navit work directory"):
        navit.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        navit.load(tmp_path)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = override(tiny_config(), ["model.init_scale=1e39"])
    with pytest.raises(FloatingPointError, match=r"at step 1: lower optim.lr"):
        loop.train(config, tmp_path)


def test_classification_trains_and_evaluates(tmp_path):
    config = override(
        tiny_config(steps=2),
        [
            "train.losses=classification",
            "model.vision.num_classes=7",
            "model.text=none",
        ],
    )
    assert loop.train(config, tmp_path)
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert {(row["set"], row["kind"]) for row in rows} == {("coarse", "classification")}
    assert all("accuracy" in row["metrics"] for row in rows)
    with pytest.raises(ValueError, match=r"classifies 'coarse' only"):
        open_tasks(config, names=("fine",))


def test_two_losses_train_and_evaluate_together(tmp_path):
    options = [
        "train.losses=sigmoid,classification:0.5",
        "model.vision.num_classes=7",
        "optim.warmup_steps=0",
    ]
    config = override(tiny_config(steps=2, log_every=1), options)
    assert loop.train(config, tmp_path)
    for values in logged(tmp_path):
        total = values["loss_sigmoid"] + 0.5 * values["loss_classification"]
        np.testing.assert_allclose(values["loss"], total, rtol=1e-6)
    before = TwoTower(config.model, rngs=nnx.Rngs(config.train.seed))
    after = navit.load(tmp_path).model
    for trained in ("text", "vision.classifier", "scale", "bias"):
        get = operator.attrgetter(trained)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), get(before), get(after))
        assert not all(jax.tree.leaves(same)), trained
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    kinds = {(row["set"], row["kind"]) for row in rows}
    assert ("coarse", "classification") in kinds and ("coarse", "zero_shot") in kinds
    found = budgets.evaluate(
        navit.load(tmp_path), config, open_tasks(config, names=("fine",))
    )
    named = {(row["set"], row["kind"]) for row in found.rows}
    assert named == {("fine", "zero_shot")}


@pytest.mark.parametrize("named_by", ["data", "task"])
@pytest.mark.parametrize(
    "path, message",
    [
        (None, "the folder has no path: set .*data.eval.path"),
        ("/nowhere/photos", "/nowhere/photos"),
    ],
)
def test_an_evaluation_without_data_fails_before_training_images_are_read(
    tmp_path, monkeypatch, named_by, path, message
):
    config, read, real = tiny_config(), [], Opener._open
    folder = Folder(path)
    if named_by == "data":
        changed = dataclasses.replace(config.data, eval=folder)
        config = dataclasses.replace(config, data=changed)
    else:  # after one that reads all training images
        probe = EvalTask("knn", source=Synthetic(size=24, seed=1))
        tasks = (probe, EvalTask("retrieval", source=folder))
        changed = dataclasses.replace(config.eval, tasks=tasks)
        config = dataclasses.replace(config, eval=changed)

    def opened(self, source):
        read.append(source)
        return real(self, source)

    monkeypatch.setattr(Opener, "_open", opened)
    with pytest.raises(FileNotFoundError, match=message) as error:
        loop.train(config, tmp_path)
    assert "\n" not in str(error.value)
    assert folder in read and config.data.train not in read


@pytest.mark.parametrize(
    "change, message",
    [
        ("eval.budgets=16,400", "beyond|ends at"),
        ("data.rows=3", r"data.rows=3 is not divisible by 8 devices"),
        (
            "data.rows=8 data.caption_rows=2",
            r"rows=8 over 8 devices is 1 rows each, .* of data.caption_rows=2",
        ),
    ],
)
def test_settings_that_would_fail_later_fail_before_training(tmp_path, change, message):
    devices = 8 if "rows" in change else 1
    options = ["model.vision.position.kind=learned_2d", f"mesh.data={devices}"]
    config = override(tiny_config(), [*options, *change.split()])
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.rows=1000000000", r"data.rows=1000000000 x .* 184,320.0 GB, .* lower"),
        ("data.row_tokens=10000000000", r"data.row_tokens=10000000000 takes"),
        ("eval.budgets=16,1000000", r"embedding 1 x 1000000 tokens .* lower"),
    ],
)
def test_what_no_memory_holds_is_refused_before_data_is_read(
    tmp_path, monkeypatch, change, message
):
    monkeypatch.delattr(Opener, "open")
    with pytest.raises(ValueError, match=message):
        loop.train(override(tiny_config(), [change]), tmp_path)


def test_classes_must_agree(tmp_path):
    config = override(
        tiny_config(), ["train.losses=classification", "model.vision.num_classes=6"]
    )
    with pytest.raises(ValueError, match=r"7 classes.*num_classes=6"):
        loop.train(config, tmp_path)


def test_interrupted_with_worker_processes(tmp_path, monkeypatch):
    """Ctrl-C reaches the workers too; they leave it to the parent."""
    config = override(tiny_config(), ["data.workers=1"])
    interrupt_at(monkeypatch, 4)
    assert not loop.train(config, tmp_path)
    monkeypatch.undo()
    assert Checkpoints(tmp_path).latest_step() == 4
