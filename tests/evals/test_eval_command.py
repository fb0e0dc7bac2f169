"""`navit eval` over several processes, and after a kill: the command itself."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config
from PIL import Image

import navit
from navit import cli
from navit.embed import Embedder
from navit.evals import vectors
from navit.model.two_tower import TwoTower
from navit.sources.folder import FolderSource

ROOT = Path(__file__).parents[2]
COUNT = 24
LOST = 5  # its header is whole, so only decoding finds out


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command of an evaluation of photographs, with labels and two captions each.

    Every call gives it a work directory of its own.
    """
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["file,caption,label"]
    for i in range(COUNT):
        height, width = rng.integers(20, 90, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
        label = "cat" if i % 2 else "dog"
        lines += [f"{i}.png,{word} {i},{label}" for word in ("picture", "photo")]
    (data / f"{LOST}.png").write_bytes((data / f"{LOST}.png").read_bytes()[:60])
    (data / "table.csv").write_text("\n".join(lines))
    config = tiny_config()
    embedder = Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=7)

    def made(workdir):
        navit.save(embedder, workdir, format="navit")
        words = ["eval", str(workdir), "--budgets", "16,25", f"data.eval=folder:{data}"]
        return [*words, "eval.batch_tokens=64"]

    return made


def start(words, code="", devices=8):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    run = f"import sys; from navit import cli; {code}\nsys.exit(cli.console())"
    return subprocess.Popen(
        [sys.executable, "-c", run, *words],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    """Exit statuses and outputs."""
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outputs


def table(workdir):
    """The rows, but for what another run of the same evaluation may have otherwise."""
    rows = json.loads((workdir / "budgets.json").read_text())["rows"]
    other = ("images_per_second", "model")  # "model" is the name of the folder
    return [{k: v for k, v in row.items() if k not in other} for row in rows]


def test_two_processes_equal_one(command, tmp_path):
    """To the bit, with an image that only one of them finds unreadable."""
    assert cli.main(command(tmp_path / "one")) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [*command(tmp_path / "two"), "--coordinator", address, "--processes", "2"]
    each = [start([*words, "--process", str(i)], devices=4) for i in range(2)]
    codes, outputs = finish(each)
    assert codes == [0, 0], "\n".join(outputs)
    assert "2 processes with 4 devices each" in outputs[0]
    named = [out.count("not evaluated") for out in outputs]
    assert sorted(named) == [0, 1]
    assert ["wrote budgets.json" in output for output in outputs] == [True, False]
    rows = table(tmp_path / "two")
    assert rows == table(tmp_path / "one")
    assert {row["unreadable"] for row in rows} == {1} and len(rows) == 4
    for one in (tmp_path / "one/embeddings").glob("*/*.npy"):
        two = tmp_path / "two/embeddings" / one.parent.name / one.name
        np.testing.assert_array_equal(np.load(two), np.load(one))


KILLED = """
import os, signal
from navit.evals import vectors
from navit.sources.folder import FolderSource
vectors._PART = 10
real, reads = FolderSource.record, []
def record(self, index):
    reads.append(index)
    if reads.count(21) == 2:  # at the second budget, in the last part
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, index)
FolderSource.record = record
"""


def test_the_same_command_goes_on_after_a_kill(command, tmp_path, monkeypatch):
    tasks = "eval.tasks=label:zero_shot"
    words = [*command(tmp_path / "run"), tasks]
    (code,), (output,) = finish([start(words, KILLED)])
    assert code == -signal.SIGKILL, output
    assert not (tmp_path / "run/budgets.json").exists()
    monkeypatch.setattr(vectors, "_PART", 10)
    reads, real = [], FolderSource.record
    with monkeypatch.context() as patch:
        patch.setattr(
            FolderSource, "record", lambda x, i: reads.append(i) or real(x, i)
        )
        assert cli.main(words) == 0
    # The unreadable image is tried at both budgets, the last part only at the second.
    assert sorted(reads) == [LOST, LOST, 20, 21, 22, 23]
    assert cli.main([*command(tmp_path / "whole"), tasks]) == 0
    assert table(tmp_path / "run") == table(tmp_path / "whole")
