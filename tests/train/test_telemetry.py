"""What a run reports of itself: utilization, memory, TensorBoard, W&B, traces."""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import pack_grids, random_patches, tiny_config

from navit.batch import Batch
from navit.config import TrainConfig, override
from navit.model import flops
from navit.train import hosts, loop, metrics, trackers
from navit.train.metrics import Meter
from navit.train.profile import Profile


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def a_batch(rng, seen=(0, 1, 2)):
    """Three images of 4, 6 and 9 tokens in two rows; of some nothing is seen."""
    grids = [(2, 2), (2, 3), (3, 3)]
    patches = random_patches(rng, grids)
    rows = [{0: (0, grids[0]), 1: (1, grids[1])}, {0: (2, grids[2])}]
    rows = [{k: x for k, x in row.items() if x[0] in seen} for row in rows]
    images = pack_grids(rows, 16, 4, patches)
    ids = np.full((2, 4), -1, np.int32)
    ids[0, :2], ids[1, 0] = (0, 1), 2
    text = np.zeros((2, 4, 24), np.int32)
    return Batch(images, text, ids, ids, ids, np.zeros((2, 4, 2), np.int32))


def read_after(batches, monkeypatch, **train):
    """The meter's numbers of steps that take half a second each."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    config = tiny_config(**train)
    meter = Meter(config, devices=2)
    for batch in batches:
        meter.add(batch, 0.125)
        now[0] += 0.5
    return config, meter.read(len(batches))


def test_counts_and_utilization(rng, monkeypatch):
    class Device:
        device_kind = "TPU v4"

        def memory_stats(self):
            return {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 7 * 2**29}

    batches = [a_batch(rng), a_batch(rng, seen=(0, 2))]
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    config, found = read_after(batches, monkeypatch)
    assert found["images_per_step"] == 2.5 and found["unreadable"] == 1
    assert found["slots_filled"] == round(5 / 16, 4) and found["fill"] == 0.5
    assert found["seconds_per_step"] == 0.5 and found["input_wait"] == 0.25
    assert found["images_per_second"] == 5 and found["tokens_per_second"] == 32
    assert found["memory_gib"] == 3 and found["memory_peak_gib"] == 3.5
    squares = 2 * (4**2 + 9**2) + 6**2
    counts = flops.Counts(19 + 13, squares, 5, 5, pairs=12)  # 2.5 squared, two times
    expected = flops.train_step(config, counts).total
    assert found["model_tflops_per_second"] == pytest.approx(expected / 1e12, rel=1e-3)
    line = metrics.line({"step": 2, "loss": 1.0, **found, "mfu": 0.414}, 6)
    assert "MFU 41.4%" in line and "waiting for input 25%" in line
    # Two such chips, of 275e12 each, are far too fast for so small a model.
    monkeypatch.setattr(flops, "peak", lambda kind: expected if "v4" in kind else None)
    assert read_after(batches, monkeypatch)[1]["mfu"] == 0.5


def test_an_image_unreadable_at_every_read_counts_once(rng):
    meter = Meter(tiny_config(), devices=1)
    for _ in range(3):
        meter.add(a_batch(rng, seen=(0, 2)), 0.0)
    assert meter.unreadable == {1}
    assert meter.read(3)["unreadable"] == 3  # places left empty


def test_all_hosts_are_counted(rng, monkeypatch):
    """Two hosts with the same counts; the other waited longer."""

    def with_another(mine):
        other = mine.copy()
        other[-1] += 250_000
        return np.stack([mine, other])

    batches = [a_batch(rng), a_batch(rng, seen=(0, 2))]
    _, alone = read_after(batches, monkeypatch)
    monkeypatch.setattr(hosts, "gather", with_another)
    _, found = read_after(batches, monkeypatch)
    for name in ("images_per_step", "images_per_second", "tokens_per_second"):
        assert found[name] == 2 * alone[name]
    for name in ("images_per_row", "fill", "slots_filled", "seconds_per_step"):
        assert found[name] == alone[name]
    assert found["unreadable"] == 2 and found["input_wait"] == 0.5


def test_a_cpu_has_no_utilization(rng, monkeypatch):
    found = read_after([a_batch(rng)], monkeypatch)[1]
    assert "mfu" not in found and "memory_gib" not in found
    assert found["model_tflops_per_second"] > 0


def test_a_missing_tracker_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        config = override(tiny_config(), [f"train.log_to={name}"])
        with pytest.raises(ValueError) as error:
            loop.train(config, tmp_path)
        assert f"needs {package}" in str(error.value)
        assert f"pip install {package}" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_log_to_is_checked():
    both = override(tiny_config(), ["train.log_to=tensorboard,wandb"]).train
    assert both.log_to == ("tensorboard", "wandb")
    assert override(tiny_config(), ["train.log_to=wandb"]).train.log_to == ("wandb",)
    assert override(tiny_config(), ["train.log_to=()"]).train.log_to == ()
    with pytest.raises(ValueError, match=r"train.log_to: expected"):
        override(tiny_config(), ["train.log_to=tensorbord"])


def losses(workdir):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logged(workdir)]


def test_tensorboard(uninterrupted, tmp_path):
    """The real library: every number of metrics.jsonl is in its files."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    config = override(tiny_config(), ["train.log_to=tensorboard"])
    assert loop.train(config, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)
    found = {}
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    while data:  # records: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[16 + length :]
    for line in logged(tmp_path):
        step = line.pop("step")
        for name, value in line.items():
            assert found[name, step] == pytest.approx(value, rel=1e-6), name


class FakeWandB:
    """The part of wandb that is used."""

    def __init__(self):
        self.runs, self.logged, self.finished = [], [], 0
        self.id = "abc123"

    def init(self, **kwargs):
        self.runs.append(kwargs)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_resumes_under_its_id(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "check_installed", lambda config: None)
    config = override(tiny_config(), ["train.log_to=wandb"])
    for start in (0, 4):
        for writer in trackers.open_writers(config, tmp_path, start):
            writer.write({"step": start + 2, "loss": 1.5})
            writer.close()
    first, second = fake.runs
    assert first["id"] is None and second["id"] == "abc123"
    assert first["project"] == "navit" and first["name"] == tmp_path.name
    assert first["config"]["optim"]["lr"] == config.optim.lr
    assert fake.logged == [(2, {"loss": 1.5}), (6, {"loss": 1.5})]
    assert fake.finished == 2


def test_wandb_offline(tmp_path, monkeypatch):
    """The real library, where it is installed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = override(tiny_config(), ["train.log_to=wandb"])
    ids = []
    for start in (0, 4):
        for writer in trackers.open_writers(config, tmp_path, start):
            writer.write({"step": start + 2, "loss": 1.5})
            writer.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def traces(workdir):
    return sorted((workdir / "profile").rglob("*.xplane.pb"))


def test_a_trace_of_some_steps_changes_nothing(uninterrupted, tmp_path):
    config = override(tiny_config(), ["train.profile_steps=3:5"])
    assert loop.train(config, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)
    # The rates leave out the time to write it.
    assert ["eta_seconds" in x for x in logged(tmp_path)] == [True, False, True]
    (trace,) = traces(tmp_path)
    events = trace.read_bytes()
    assert b"train_step" in events
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


def test_an_interrupted_trace_is_closed(tmp_path, monkeypatch):
    real = loop.make_train_step

    def interrupted(*args):
        step = real(*args)

        def run(state, batch):
            if int(state.step) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(state, batch)

        return run

    monkeypatch.setattr(loop, "make_train_step", interrupted)
    config = override(tiny_config(), ["train.profile_steps=2:6"])
    assert not loop.train(config, tmp_path)
    assert [line["step"] for line in logged(tmp_path)] == [2]
    assert len(traces(tmp_path)) == 1
    # Another trace can start, so none is open.
    with Profile(TrainConfig(profile_steps="1:2"), Path(tmp_path / "other")) as profile:
        with profile.step(1):
            pass
        profile.after(1, jax.numpy.zeros(()))
        assert list((tmp_path / "other").rglob("*.xplane.pb"))


def test_an_error_closes_a_trace(tmp_path):
    profile = Profile(TrainConfig(profile_steps="1:9"), tmp_path)
    with pytest.raises(MemoryError), profile, profile.step(1):
        raise MemoryError
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("window", ["5:5", "5:4", "0:3", "4:8", "3", "a:b", "1:2:3"])
def test_a_window_outside_the_run_is_refused(window):
    with pytest.raises(ValueError, match="profile_steps") as error:
        override(tiny_config(), [f"train.profile_steps={window}"])
    assert window in str(error.value)
    assert override(tiny_config(), ["train.profile_steps=4:7"]).train.profile_window
