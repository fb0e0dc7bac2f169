"""Several processes: the same numbers as one, the same last step, no waiting for ever.

Two processes of 4 devices each on this machine, over gloo: the command line itself, in
processes of its own.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

import navit
from navit.config import Config, override
from navit.input import pipeline
from navit.sources.bucket import Bucket
from navit.sources.synthetic import SyntheticSource
from navit.train import hosts, loop, remote_workdir
from navit.train import step as step_lib
from navit.train.checkpoint import Checkpoints
from navit.train.interruption import Interruption
from navit.train.workdir import steps

ROOT = Path(__file__).parents[2]
STEPS = 5
# Widths that 8 devices can share, fewer images than rows: some devices stay empty.
OPTIONS = [
    "data.rows=8",
    "data.train.size=14",
    "train.log_every=1",
    "model.vision.width=32",
    "model.text.width=32",
    "model.vision.depth=1",
    # The classifier's logits are computed on all devices.
    "train.losses=sigmoid,classification:0.5",
    "model.vision.num_classes=7",
    "data.eval.size=24",
    "eval.budgets=16",
]
# Of the images to evaluate; they are in rows of their own, 16 of them process 0's.
UNREADABLE = range(16, 24)
PRESETS = {
    "replicate": ["mesh.data=8"],
    "fsdp": ["mesh.data=1", "mesh.fsdp=8"],
    "fsdp, tensor": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
}


def get_config() -> Config:
    """This file is the config of the processes that it starts."""
    return override(tiny_config(steps=STEPS), OPTIONS)


# Before the command line runs: what the process of this index does at a step; all do if
# it is None.
MISHAPS = """
import os, sys
sys.path.insert(0, {tests!r})
import test_hosts
from navit import cli
from navit.input import pipeline
real = pipeline.train_batches
def batches(config, source, *, start_step=0, **kwargs):
    found = real(config, source, start_step=start_step, **kwargs)
    class Batches:
        step = start_step
        def __iter__(self):
            return self
        def __next__(self):
            self.step += 1
            if self.step == {step} and {process} in (None, kwargs["process_index"]):
                {mishap}
            return next(found)
        def close(self):
            found.close()
    return Batches()
pipeline.train_batches = batches
sys.exit(cli.console())
"""


def lose_images(patch):
    """This process cannot read some images that it evaluates."""
    real = SyntheticSource.record

    def record(source, index):
        found = real(source, index)
        lost = len(source) == 24 and index in UNREADABLE
        return found._replace(image=b"no image") if lost else found

    patch(SyntheticSource, "record", record)


def fail_uploads():
    """This process cannot send its part of a checkpoint."""

    def send(bucket, folder, names, below=""):
        raise OSError(f"{bucket.url}: quota exceeded")

    Bucket.send = send


def die_while_sending():
    """This process is killed at the second checkpoint, as it still sends the first."""
    Bucket.send = lambda *_: threading.Event().wait()

    def wait(checkpoints):
        if checkpoints._saving:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.wait = wait


def lose_the_loss(batches, images):
    """The batches; the loss of one with any of these images is not a number."""
    real, bad = step_lib.batch_loss, -7

    def loss(model, batch, *others):
        value, parts = real(model, batch, *others)
        return jnp.where((batch.label == bad).any(), jnp.nan, value), parts

    def marked(batch):
        label = np.where(np.isin(batch.id, images), bad, batch.label)
        return batch._replace(label=label.astype(np.int32))

    step_lib.batch_loss = loss
    return (marked(batch) for batch in batches)


def start(workdir, *options, step=0, process=-1, mishap="pass"):
    """`navit train` of this file in two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = MISHAPS.format(
        tests=str(ROOT / "tests"), step=step, process=process, mishap=mishap
    )
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}",
    }
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        __file__,
        *options,
        "--workdir",
        f"{workdir}",
        "--coordinator",
        address,
        "--processes",
        "2",
    ]
    return [
        subprocess.Popen(
            [*command, "--process", str(i)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes, timeout=240):
    """Exit statuses and outputs."""
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outputs


def logged(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(workdir, expected):
    """Losses and parameters after the last step, within 1e-5."""
    a, b = logged(workdir), logged(expected)
    assert [x["step"] for x in a] == [x["step"] for x in b] == [*range(1, STEPS + 1)]
    for name in ("loss", "grad_norm", "images_per_step", "fill", "slots_filled"):
        np.testing.assert_allclose(
            [x[name] for x in a], [x[name] for x in b], atol=1e-5, err_msg=name
        )
    a, b = navit.load(workdir).model, navit.load(expected).model
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        # A key's bias has a gradient of exactly 0, and Adam follows its rounding.
        if ".key.bias" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(x, y, atol=1e-5, err_msg=str(path))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lose_images(patch.setattr)
        assert loop.train(get_config(), workdir)
    return workdir


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("replicate", marks=pytest.mark.slow),
        pytest.param("fsdp", marks=pytest.mark.slow),
        "fsdp, tensor",
    ],
)
def test_two_processes_equal_one_device(one_device, tmp_path, preset):
    """And so 8 devices of one process, which `test_sharding` compares to one.

    Images that only process 1 cannot read are left out of the evaluation by both.
    """
    lost = "test_hosts.lose_images(setattr)"
    processes = start(tmp_path, *PRESETS[preset], step=1, process=1, mishap=lost)
    codes, outputs = finish(processes)
    assert codes == [0, 0], "\n".join(outputs)
    assert "2 processes with 4 devices each" in outputs[0]
    assert "step " not in outputs[1]  # only process 0 logs steps
    assert_same(tmp_path, one_device)
    found, expected = (
        json.loads((x / "budgets.json").read_text())["rows"]
        for x in (tmp_path, one_device)
    )
    for a, b in zip(found, expected, strict=True):
        assert [a[x] for x in ("set", "kind", "budget", "images", "chance")] == [
            b[x] for x in ("set", "kind", "budget", "images", "chance")
        ]
        # Of 16 images, one may change its place by rounding.
        for name, value in a["metrics"].items():
            assert abs(value - b["metrics"][name]) <= 0.1
        assert a["unreadable"] == b["unreadable"] == len(UNREADABLE)
    assert any("accuracy" in row["metrics"] for row in found)
    assert "not evaluated" not in outputs[0]
    assert outputs[1].count("not evaluated") == len(UNREADABLE)
    # The images that were read are kept, the others are tried again.
    (kept,) = (tmp_path / "embeddings").glob("16-*/*.npy")
    assert np.load(kept).any(-1).sum() == 16


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(one_device, tmp_path):
    """The same command then resumes, to the same result."""
    mishap = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    options = [*PRESETS["fsdp"], "eval.max_images=2"]
    codes, outputs = finish(start(tmp_path, *options, step=3, process=1, mishap=mishap))
    assert codes == [0, 0], "\n".join(outputs)
    assert "preempted; saved step 2" in outputs[0]
    assert [x["step"] for x in logged(tmp_path)] == [1, 2]
    codes, outputs = finish(start(tmp_path, *options))
    assert codes == [0, 0], "\n".join(outputs)
    assert "resuming from step 2" in outputs[0]
    assert_same(tmp_path, one_device)


@pytest.mark.slow
def test_a_preempted_run_goes_on_with_other_devices(one_device, tmp_path):
    """Behind a URL, where the processes share no folder; then alone on 8 and on 1."""
    mishap = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    url = f"file://{tmp_path}/run"
    codes, outputs = finish(
        start(url, *PRESETS["fsdp"], step=3, process=1, mishap=mishap)
    )
    assert codes == [0, 0], "\n".join(outputs)
    assert "preempted; saved step 2" in outputs[0]
    for name, options in (("8", ["mesh.data=2", "mesh.fsdp=4"]), ("1", [])):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        with remote_workdir.training(f"file://{tmp_path / name}") as (workdir, sender):
            assert loop.train(override(get_config(), options), workdir, remote=sender)
        assert_same(tmp_path / name, one_device)


@pytest.mark.parametrize("seconds, steps", [(20.0, 1), (2.0, 2), (0.01, 10)])
def test_processes_ask_one_another_in_time(monkeypatch, seconds, steps):
    """However slow a step, a request is heard after it, or within five seconds."""
    clock, asked = [0.0], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(hosts, "any_of", lambda flag: asked.append(clock[0]) or flag)
    monkeypatch.setattr(hosts, "gather", lambda x: np.stack([x, 0 * x]))
    interruption = Interruption()
    for step in range(1, 50):
        clock[0] += seconds
        assert not interruption.after(step)
    assert asked[:2] == [seconds, 2 * seconds]
    np.testing.assert_allclose(np.diff(asked[1:]), steps * seconds)
    interruption.requested = True
    clock[0] += seconds
    assert any(interruption.after(step) for step in range(50, 50 + steps))


@pytest.mark.slow
def test_a_failed_upload_in_one_ends_all_with_a_line_each(tmp_path):
    options = ["mesh.data=8", "train.checkpoint_every=1"]
    url, mishap = f"file://{tmp_path}/run", "test_hosts.fail_uploads()"
    codes, outputs = finish(start(url, *options, step=2, process=1, mishap=mishap))
    assert codes == [1, 1], "\n".join(outputs)
    for process, output in enumerate(outputs):
        last = output.strip().splitlines()[-1]
        assert last.startswith(f"navit: process {process}: OSError: cannot write"), last
        assert "quota exceeded" in last


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_sends_ends_the_others_in_a_line(tmp_path):
    """Process 0 waits for its part of the checkpoint then, and must not wait on."""
    options = ["mesh.data=8", "train.checkpoint_every=1"]
    url, mishap = f"file://{tmp_path}/run", "test_hosts.die_while_sending()"
    codes, outputs = finish(start(url, *options, step=1, process=1, mishap=mishap))
    assert codes == [1, -signal.SIGKILL], "\n".join(outputs)
    last = outputs[0].strip().splitlines()[-1]
    assert last.startswith("navit: process 0: lost another process after"), last


@pytest.mark.slow
def test_an_error_in_one_ends_all(tmp_path):
    mishap = "raise ValueError('no disk')"
    began = time.monotonic()
    codes, outputs = finish(
        start(tmp_path, "mesh.data=8", step=3, process=1, mishap=mishap)
    )
    assert codes[1] == 1 and codes[0] != 0, "\n".join(outputs)
    assert "navit: process 1: ValueError: no disk" in outputs[1]
    assert "navit: process 0: lost another process after" in outputs[0]
    assert "Traceback" not in outputs[0] and "stack trace" not in outputs[0]
    assert time.monotonic() - began < 200


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_at_the_same_step(tmp_path):
    """One update is left out, and the second ends the run; nothing is written twice."""
    options = [
        *PRESETS["fsdp"],
        "data.train.size=200",
        "train.log_every=100",
        "train.on_nonfinite=skip:1",
    ]
    planned = list(pipeline.train_batches(override(get_config(), options)))
    # In rows of process 1; all images are in one epoch.
    bad = [int(planned[step - 1].id[-1].max()) for step in (2, 4)]
    assert [[i for i in bad if i in batch.id] for batch in planned] == [
        [],
        bad[:1],
        [],
        bad[1:],
        [],
    ]
    mishap = f"nonlocal found; found = test_hosts.lose_the_loss(found, {bad})"
    processes = start(tmp_path, *options, step=1, process=None, mishap=mishap)
    codes, outputs = finish(processes)
    assert codes == [1, 1], "\n".join(outputs)
    for process, output in enumerate(outputs):
        assert "at step 2: this update is left out (1 of at most 1)" in output
        error = f"navit: process {process}: FloatingPointError: the loss is nan"
        (line,) = [line for line in output.splitlines() if error in line]
        assert "at step 4: lower optim.lr" in line and "step 3 is saved" in line
        assert "the state of step 3" in line
    kept = tmp_path / "nonfinite"
    notes = [json.loads(x) for x in (kept / "batches.jsonl").read_text().splitlines()]
    assert [note["step"] for note in notes] == [2, 4]
    for note in notes:
        ids = planned[note["step"] - 1].id
        assert note["ids"] == np.unique(ids[ids >= 0]).tolist()
    assert steps(kept / "checkpoints") == [3]
    about = json.loads((kept / "checkpoints/3/about/metadata").read_text())
    assert about["skipped"] == 1
    assert steps(tmp_path / "checkpoints") == [3]


def test_half_an_address_is_an_error():
    with (
        pytest.raises(ValueError, match=r"--process None go together"),
        hosts.joined("localhost:1234", 2),
    ):
        pass


@pytest.mark.parametrize(
    "env, several",
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "t-0:1"}, True),
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_the_environment_shows_whether_to_join_others(env, several):
    assert hosts._started_as_one_of_several(env) == several


def as_processes(monkeypatch, *calls):
    """What each call raises, run side by side as the processes of one run."""
    arrays, meet = [None] * len(calls), threading.Barrier(len(calls), timeout=20)

    def gather(values):
        meet.wait()
        arrays[int(threading.current_thread().name)] = values
        meet.wait()
        return np.stack(arrays)

    raised = [None] * len(calls)

    def run(process):
        try:
            calls[process]()
        except ValueError as error:
            raised[process] = str(error)

    monkeypatch.setattr(hosts, "gather", gather)
    threads = [
        threading.Thread(target=run, args=(i,), name=f"{i}") for i in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_differences_between_processes_are_named(monkeypatch):
    same, other = get_config(), override(get_config(), ["optim.lr=0.5", "data.seed=3"])
    check = functools.partial(hosts.check_same_config, same)
    assert as_processes(monkeypatch, check, check) == [None, None]
    found = as_processes(
        monkeypatch, check, check, functools.partial(hosts.check_same_config, other)
    )
    assert len({*found}) == 1
    assert "process 0 and process 2 have different configs" in found[0]
    assert "data.seed: 0 -> 3; optim.lr: 0.001 -> 0.5" in found[0]
    check = functools.partial(hosts.check_same, "data.train")
    found = as_processes(monkeypatch, lambda: check("17 images"), lambda: check("é"))
    assert len({*found}) == 1
    assert "data.train is é in process 1 and 17 images in process 0" in found[0]
