"""The commands as a user types them, on real photographs, with their errors.

They run in this process, but for those that a signal stops.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import navit
from navit import cli
from navit.embed_rows import embed_packed
from navit.parser import make_parser

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data/sample"
NAVIT = [sys.executable, "-c", "import sys, navit.cli; sys.exit(navit.cli.console())"]
SMALL = [
    *["train.steps=4", "train.log_every=2", "train.checkpoint_every=2"],
    *["model.vision.width=16", "model.vision.depth=1", "model.vision.mlp_dim=16"],
    *["model.text.width=16", "model.text.depth=1", "model.text.mlp_dim=16"],
    *["data.train.split=all", "data.eval.split=all", "eval.budgets=64,100"],
    "mesh.data=1",
]

# Of started processes: as many devices as here, so that they compile the same programs.
ENV = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}


def run(*args):
    """A command in this process: its exit status, and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    handler, log = logging.StreamHandler(out), logging.getLogger("navit")
    log.addHandler(handler)
    try:
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = cli.main([str(x) for x in args])
    except SystemExit as stopped:
        status = stopped.code
    finally:
        log.removeHandler(handler)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A model trained on the photographs of data/sample."""
    workdir = tmp_path_factory.mktemp("runs") / "photos"
    done = run("train", "configs/photos.py", *SMALL, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"step +4/4 +loss .* images/s .* tokens/s +fill .*% +ETA", done.stdout
    )
    return workdir


def results_of(folder):
    """The rows of its table, by kind and budget."""
    rows = json.loads((folder / "budgets.json").read_text())["rows"]
    return {(row["kind"], row["budget"]): row for row in rows}


def test_train_on_photographs_leaves_its_results(workdir):
    found = results_of(workdir)
    assert {*found} == {
        (kind, budget) for kind in ("zero_shot", "retrieval") for budget in (64, 100)
    }
    for (kind, _), row in found.items():
        assert row["step"] == 4 and row["images"] == 17
        names = {"image_to_text_r1", "text_to_image_r1"}
        if kind == "zero_shot":
            names = {"accuracy", "calibration_error"}
        assert names <= row["metrics"].keys()
        assert all(0 <= row["metrics"][name] <= 1 for name in names)
    with Image.open(workdir / "budgets.png") as plot:
        assert plot.size[0] > 500
    logged = [
        json.loads(x) for x in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["step"] for line in logged] == [2, 4]
    assert logged[-1]["images_per_step"] == 17


def test_eval_repeats_the_evaluation_from_the_checkpoint(workdir, tmp_path):
    alone = tmp_path / "moved"
    shutil.copytree(workdir / "checkpoints", alone / "checkpoints")
    both = ["--task", "label", "--task", "retrieval"]
    done = run("eval", alone, "--budgets", "64,150,64", *both)
    assert done.returncode == 0, done.stderr
    found, before = results_of(alone), results_of(workdir)
    assert {budget for _, budget in found} == {64, 150}
    for kind in ("zero_shot", "retrieval"):
        for name in ("metrics", "tokens_per_image"):
            assert found[kind, 64][name] == before[kind, 64][name]
    assert "never trained at 150 tokens" in done.stdout
    page = "| letter page, 200 dpi | 150 | 13x11 | 208x176 | 19 |"
    assert page in (alone / "budgets.md").read_text()
    assert "page" not in done.stdout


def test_eval_takes_what_an_evaluation_may_change(workdir, tmp_path):
    out = ["--budgets", "64", "--out", tmp_path]
    changes = ["data.max_upscale=0.05", "model.attention=xla"]
    done = run("eval", workdir, *out, *changes)
    assert done.returncode == 0, done.stderr
    small, before = results_of(tmp_path), results_of(workdir)
    kinds = ("zero_shot", "retrieval")
    for kind in kinds:
        few, many = (x[kind, 64]["tokens_per_image"] for x in (small, before))
        assert few < many / 4
    assert any(small[x, 64]["metrics"] != before[x, 64]["metrics"] for x in kinds)
    done = run("eval", workdir, *out, "model.vision.pool=mean")
    one_line(done, "model.vision.pool: 'map' -> 'mean'", "data.*, eval.* and model.")


def test_embed_photographs_of_all_sizes(workdir, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"tiny.png": (1, 1), "tall.jpg": (37, 911), "huge.jpg": (4000, 3000)}
    files = [SAMPLE / "cat.jpg", SAMPLE / "coffee_rotated.jpg"]
    for name, (width, height) in sizes.items():
        color = tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (width, height), color).save(tmp_path / name)
        files.append(tmp_path / name)
    out = tmp_path / "z.npz"
    done = run("embed", workdir, *files, "--max-tokens", 729, "--out", tmp_path / "z")
    assert done.returncode == 0, done.stderr
    assert f"wrote 5 embeddings to {out}" in done.stdout
    with np.load(out, allow_pickle=False) as found:
        assert found["names"].tolist() == [str(f) for f in files]
        z = found["embeddings"]
    assert z.shape == (5, 16) and z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)

    model = navit.load(workdir)
    arrays = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    arrays[1] = np.rot90(arrays[1], -1)  # as its EXIF tag says
    # Decoded by Pillow here and by another JPEG transform there, hence the tolerance.
    np.testing.assert_allclose(model.embed_images(arrays, max_tokens=729), z, atol=0.02)
    pictures = [Image.open(f) for f in files]
    np.testing.assert_allclose(
        model.embed_images(pictures, max_tokens=729), z, atol=0.02
    )


def test_public_names_work_together(workdir):
    model = navit.load(workdir)
    images = [(SAMPLE / name).read_bytes() for name in ("cat.jpg", "rocket.jpg")]
    z = model.embed_images(images)
    t = model.embed_texts(["a cat", "a rocket", "coins"])
    assert z.shape == (2, 16) and t.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(t, axis=1), 1, atol=1e-5)
    logits = model.logits(z, t)
    scale = float(np.exp(model.model.scale[...]))
    bias = float(model.model.bias[...])
    np.testing.assert_allclose(logits, scale * z @ t.T + bias, rtol=1e-5)
    # Alone or together, in any order.
    np.testing.assert_allclose(model.embed_images(images[::-1])[::-1], z, atol=1e-5)
    np.testing.assert_allclose(model.embed_images(images[:1]), z[:1], atol=1e-5)
    packed, index = navit.pack(
        images, max_tokens=256, row_tokens=512, return_index=True
    )
    out = model.vision(packed)
    pooled = np.zeros_like(z)
    pooled[index[index >= 0]] = np.asarray(out.pooled)[index >= 0]
    pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
    np.testing.assert_allclose(pooled, z, atol=1e-5)
    assert model.embed_images([]).shape == (0, 16)
    assert model.embed_texts([]).shape == (0, 16)


def test_new_shapes_do_not_compile_again(workdir, rng):
    model = navit.load(workdir)

    def mix(*sizes):
        return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]

    model.embed_images(mix((64, 64), (40, 90), (300, 20)), max_tokens=64)
    before = embed_packed._cache_size()
    other = mix(
        (30, 200), (17, 31), (128, 128), (90, 40), *[(50, 60 + i) for i in range(9)]
    )
    model.embed_images(other[:4], max_tokens=64)
    model.embed_images(other[4:8][::-1], max_tokens=64)
    assert embed_packed._cache_size() == before


def test_ctrl_c_and_the_same_command_again(tmp_path):
    command = ["train", "configs/photos.py", *SMALL, "train.steps=40"]
    command += ["train.checkpoint_every=40", "--workdir", str(tmp_path)]
    with subprocess.Popen(
        [*NAVIT, *command], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    stopped = int(re.search(r"interrupted; saved step (\d+)", rest)[1])
    assert 2 <= stopped < 40
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step {stopped} " in again.stdout


def test_ctrl_c_in_the_closing_evaluation(workdir):
    command = ["train", "configs/photos.py", *SMALL, "--workdir", str(workdir)]
    # Each is compiled anew, so the evaluation takes longer than the test waits.
    budgets = ",".join(map(str, range(700, 1000, 10)))
    with subprocess.Popen(
        [*NAVIT, *command, f"eval.budgets={budgets}"],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "17 images at" in line:
                break
        time.sleep(1)  # an orderly shutdown crashes about here
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert (process.returncode, stderr.strip()[-14:]) == (130, "navit: stopped")
    again = run(*command, "eval.budgets=64")
    assert again.returncode == 0, again.stderr


def test_killed_while_saving_and_resumed(tmp_path):
    """The kill nearly always comes during a save."""
    command = ["train", "configs/photos.py", *SMALL, "train.steps=40"]
    command += ["train.log_every=1", "train.checkpoint_every=1"]
    command += ["--workdir", str(tmp_path)]
    with subprocess.Popen(
        [*NAVIT, *command], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step") and "12/40" in line:
                process.kill()
                break
    again = run(*command, "train.checkpoint_every=40")  # which saves less often
    assert again.returncode == 0, again.stderr
    resumed = int(re.search(r"resuming from step (\d+) ", again.stdout)[1])
    assert process.returncode == -signal.SIGKILL
    assert 10 <= resumed < 40
    assert "step     40/40" in again.stdout


def one_line(done, *words):
    assert done.returncode == 1, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def folder(tmp_path, table="file,caption\ncat.jpg,a cat\n", files=("cat.jpg",)):
    for file in files:
        shutil.copy(SAMPLE / file, tmp_path / file)
    if table:
        (tmp_path / "captions.csv").write_text(table)
    return f"data.train.path={tmp_path}"


def test_mistakes_give_one_line_that_names_the_cause(workdir, tmp_path):
    train = ["train", "configs/photos.py", *SMALL, "--workdir", tmp_path / "run"]
    one_line(run(*train, "optim.lrr=1"), "optim.lrr", "did you mean 'lr'")
    one_line(run("train", "configs/photo.py"), "configs/photo.py", "photos.py")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(run(*train, f"data.train.path={empty}"), str(empty), "file,caption")
    missing = tmp_path / "missing"
    missing.mkdir()
    path = folder(missing, "file,caption\nlost.jpg,a cat\n")
    one_line(run(*train, path), "lost.jpg", "captions.csv", "delete")
    one_line(
        run("train", "configs/photos.py", *SMALL, "optim.lr=1", "--workdir", workdir),
        "optim.lr: 0.001 -> 1.0",
        "--workdir",
    )
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((SAMPLE / "cat.jpg").read_bytes()[:2000])
    out = tmp_path / "z.npz"
    one_line(run("embed", workdir, broken, "--out", out), "broken.jpg")
    one_line(run("embed", workdir, tmp_path / "no.jpg", "--out", out), "no.jpg")
    assert not out.exists()
    one_line(run("train", "quickstart"), "did you mean configs/quickstart.py")
    one_line(run("eval", tmp_path), str(tmp_path), "work directory")
    one_line(run("eval", workdir, "--task", "labels"), "'labels'", "label")


@pytest.mark.parametrize(
    "command",
    [
        "eval gs://bucket/run --out s3://bucket/run",
        "embed gs://bucket/run cat.jpg --out gs://bucket/z.npz",
        "convert model.npz gs://bucket/model",
    ],
)
def test_a_url_where_a_local_path_belongs_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args(command.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "://bucket" in error and "name a local path" in error


@pytest.mark.parametrize("command", ["eval", "train CONFIG --workdir"])
def test_a_url_that_lacks_a_slash_is_refused(command, capsys):
    for text in ("gs:/bucket/run", "file:/run"):
        with pytest.raises(SystemExit):
            make_parser().parse_args([*command.split(), text])
        assert f"{text} is neither a URL" in capsys.readouterr().err
    for text in ("gs://bucket/run", "./gs:/bucket/run", "C:/run", "run:1"):
        make_parser().parse_args([*command.split(), text])


def test_unreadable_photograph_is_named_and_the_run_continues(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    table = (
        "file,caption\ncat.jpg,a cat\nrocket.jpg,a rocket\nbad.jpg,bad\ncut.jpg,cut\n"
    )
    path = folder(data, table, ("cat.jpg", "rocket.jpg"))
    (data / "bad.jpg").write_text("not an image")
    # Its header is whole, so only decoding finds out.
    (data / "cut.jpg").write_bytes((SAMPLE / "grass.jpg").read_bytes()[:6000])
    done = run(
        "train", "configs/photos.py", *SMALL, path, "--workdir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"left out, unreadable: .*bad.jpg", done.stdout)
    assert re.search(r"left empty: .*cut.jpg", done.stdout)
    assert "unreadable 2" in done.stdout  # once in each of the two steps logged


def test_the_version_and_the_nearest_command(capsys):
    for words, shown in (
        (["--version"], f"navit {navit.__version__}"),
        (["trian", "configs/photos.py"], "'trian'; did you mean 'train'?"),
        (["--debug", "evla"], "'evla'; did you mean 'eval'?"),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert shown in "".join(capsys.readouterr())


def test_a_warning_is_shown_once(tmp_path, caplog):
    """Also if the same folder is read for training and for the evaluation."""
    path = folder(tmp_path, "file,caption\ncat.jpg,a\nlost.jpg,b\n")
    splits = ["data.train.split=all", "data.eval.split=all"]
    for _ in range(2):  # of each command
        caplog.clear()
        words = ["index", "configs/photos.py", path, *splits, "data.train.missing=0.5"]
        assert cli.main(words) == 0
        assert caplog.text.count("lost.jpg") == 1


def test_help_shows_examples():
    done = run("--help")
    assert done.returncode == 0
    assert "navit train configs/quickstart.py" in done.stdout
    assert "key.path=value" in run("train", "--help").stdout
    done = run("train", "configs/quickstart.py", "optim.lr=0.5", "--print-config")
    assert json.loads(done.stdout)["optim"]["lr"] == 0.5
    module = subprocess.run(
        [sys.executable, "-m", "navit", "--help"], capture_output=True, text=True
    )
    assert "navit train configs/quickstart.py" in module.stdout


def test_plan_and_bench_show_the_input_of_a_config(tmp_path):
    out = tmp_path / "plan.png"
    done = run("plan", "configs/photos.py", *SMALL, "--rows", "512", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert re.search(r"512 +\d+\.\d+% +\d+\.\d", done.stdout), done.stdout
    assert out.stat().st_size > 5000
    done = run("bench", "input", "configs/photos.py", *SMALL, "--batches", "2")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^(\w+) +[\d.]+ images/s of CPU", done.stdout, re.MULTILINE)
    assert stages == ["plan", "read", "pixels", "pipeline"]
    assert re.search(r"pipeline / pixels: \d+\.\d%", done.stdout)
    assert re.search(r"as trained +[\d.]+ images/s of wall time", done.stdout)


def test_killed_with_workers_leaves_nothing_running_and_resumes_the_same(tmp_path):
    """Workers held the pipe of a killed run for minutes, and it never seemed to end."""
    config = ["train", "configs/photos.py", *SMALL, "train.log_every=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*config, "--workdir", whole).returncode == 0
    process = subprocess.Popen(
        [*NAVIT, *config, "data.workers=2", "--workdir", str(killed)],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=30)  # returns when the last holder of the pipe is gone
    assert process.returncode == -signal.SIGKILL
    # Resume with another number of workers.
    assert run(*config, "data.workers=1", "--workdir", killed).returncode == 0
    logs = [(path / "metrics.jsonl").read_text() for path in (whole, killed)]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
    assert len(losses[0]) == 4
    np.testing.assert_array_equal(*losses)
