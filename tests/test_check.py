"""`navit check`: good kernels pass, and a wrong one is reported and exits with 1."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from navit import cli, machine
from navit.config import Config
from navit.kernels import fused, splash_blocks
from navit.kernels.unpack import unpack

SMALL = [
    "model.vision.width=128",
    "model.vision.num_heads=2",
    "model.vision.mlp_dim=128",
    "model.text.width=64",
    "model.text.num_heads=2",
    "model.text.mlp_dim=64",
    "data.row_tokens=128",
    "data.budgets=64",
    "data.rows=4",
    "mesh.data=1",
]


@pytest.fixture(autouse=True)
def decoding_is_short(monkeypatch):
    monkeypatch.setattr(machine, "_DECODING", 0.05)


def outcomes(text):
    """The start of the outcome in each line of the table, by its name."""
    line = re.compile(r"((?:vision|text|loss) .*?)  +.*?(ok|differs|does|not)\b")
    return {m[1]: m[2] for x in text.splitlines() if (m := line.match(x))}


def test_good_kernels_pass(capsys, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "check.json"
    arguments = ["--workdir", str(workdir), "--json", str(out)]
    assert cli.main(["check", *SMALL, *arguments]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}" in text
    assert "one core decodes" in text and "bit-equal" in text
    table = outcomes(text)
    assert {name for name in table if table[name] == "ok"} == {
        "vision attention xla",
        "vision attention unpack",
        "vision attention blocks",
        "vision attention splash",
        "vision attention splash_skip",
        "vision attention flash",
        "vision fused_mlp",
        "vision norm_project",
        "loss gather",
    }
    assert {name for name in table if table[name] == "not"} == {
        "text fused_mlp",  # 64 channels
        "text norm_project",
        "loss ring",  # one device
    }
    assert "not checked: needs several devices" in text
    assert "interpreted: Pallas simulates a TPU" in text
    assert list(tmp_path.iterdir()) == [out]  # the new work directory is removed
    results = json.loads(out.read_text())
    assert results["ok"] and len(results["kernels"]) == len(table)


def test_a_wrong_kernel_is_reported(capsys, monkeypatch, tmp_path):
    def logits(self, k, qt, query_ids, key_ids):  # without a mask
        return splash_blocks.dot(k, qt, (1, 0))

    def call(self, *args, **kwargs):
        raise NotImplementedError("Mosaic cannot do this")

    def not_finite(*args, **kwargs):
        return unpack(*args, **kwargs) * jnp.nan

    monkeypatch.setattr(splash_blocks.Call, "logits", logits)
    monkeypatch.setattr(fused.Call, "__call__", call)
    monkeypatch.setattr("navit.model.attention.unpack", not_finite)
    out = tmp_path / "check.json"
    assert cli.main(["check", *SMALL, "train.losses=softmax", "--json", str(out)]) == 1
    text = capsys.readouterr().out
    table = outcomes(text)
    assert {name: table[name] for name in table if table[name] != "not"} == {
        "vision attention xla": "ok",
        "vision attention unpack": "differs",
        "vision attention blocks": "ok",
        "vision attention splash": "differs",
        "vision attention splash_skip": "differs",
        "vision attention flash": "ok",
        "vision fused_mlp": "does",
        "vision norm_project": "does",
    }
    assert "does not compile: Mosaic cannot do this" in text
    assert "a result is NaN or infinite" in text
    unpacked = json.loads(out.read_text(), parse_constant=pytest.fail)["kernels"][1]
    assert unpacked["name"] == "vision attention unpack"
    assert unpacked["values"] is unpacked["gradients"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["mesh.data=2", "data.rows=3"], "data.rows=3 is not divisible by 2 devices"),
        (["model.attention=splash"], "splash is a TPU kernel, and this runs on a cpu"),
        (
            ["mesh.tensor=2", "model.vision.num_heads=1"],
            "model.vision.num_heads=1 cannot be split over mesh.tensor=2",
        ),
        (["optim.vision_lr=0"], "optim.vision_lr=0 freezes a tower"),
    ],
)
def test_a_config_that_training_refuses_is_refused(overrides, words, capsys):
    assert cli.main(["check", *SMALL, *overrides]) == 1
    text = capsys.readouterr()
    assert words in text.err and not text.out


def test_a_damaged_checkpoint_is_reported(capsys, monkeypatch):
    from navit.train.checkpoint import Checkpoints

    restore = Checkpoints.restore_model

    def restored(self, like):
        model, step = restore(self, like)
        return jax.tree.map(lambda x: x + 1, model), step

    monkeypatch.setattr(Checkpoints, "restore_model", restored)
    monkeypatch.setattr("navit.machine.kernel_verdicts", lambda *args: [])
    assert cli.main(["check", *SMALL]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_an_unknown_field_is_a_one_line_error(capsys):
    assert cli.main(["check", "data.rwos=3"]) == 1
    assert "did you mean 'rows'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data/sample", "no/such/folder"])
def test_decoding_is_measured_with_and_without_the_sample(name, monkeypatch, tmp_path):
    if name != "data/sample":
        monkeypatch.setattr(machine, "_SAMPLE", tmp_path)
    decoding = machine._decoding(Config())
    assert decoding.images_per_second > 0 and decoding.megapixels_per_second > 0
    assert ("sample" in decoding.images) == (name == "data/sample")
