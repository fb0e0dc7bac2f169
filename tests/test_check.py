"""`navit check`: good kernels pass, and a wrong one is reported and exits with 1."""

import json
import re

import jax
import pytest

from navit import cli, machine
from navit.config import Config
from navit.kernels import fused, splash_blocks

SMALL = [
    *["model.vision.width=128", "model.vision.num_heads=2", "model.vision.mlp_dim=128"],
    *["model.text.width=64", "model.text.num_heads=2", "model.text.mlp_dim=64"],
    *["data.row_tokens=128", "data.budgets=64", "data.rows=4", "mesh.data=1"],
]


@pytest.fixture(autouse=True)
def decoding_is_short(monkeypatch):
    monkeypatch.setattr(machine, "_DECODING", 0.05)


def verdicts(text):
    """The verdict of each line of the table, by its name."""
    line = re.compile(r"((?:vision|text|loss) .*?)  +.*?(ok|differs|does|not)\b")
    return {m[1]: m[2] for x in text.splitlines() if (m := line.match(x))}


def test_good_kernels_pass(capsys, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "check.json"
    arguments = ["--workdir", str(workdir), "--json", str(out)]
    assert cli.main(["check", *SMALL, *arguments]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}" in text
    assert "one core decodes" in text and "bit-equal" in text
    table = verdicts(text)
    assert {name for name in table if table[name] == "ok"} == {
        *(f"vision attention {x}" for x in ("xla", "unpack", "splash", "splash_skip")),
        *("vision fused_mlp", "vision norm_project", "loss gather", "loss ring"),
    }
    assert {name for name in table if table[name] == "not"} == {
        "text fused_mlp",  # 64 channels
        "text norm_project",
    }
    assert "interpreted: Pallas simulates a TPU" in text
    assert list(workdir.iterdir()) == []
    results = json.loads(out.read_text())
    assert results["ok"] and len(results["kernels"]) == len(table)


def test_a_wrong_kernel_is_reported(capsys, monkeypatch):
    def logits(self, k, qt, query_ids, key_ids):  # without a mask
        return splash_blocks.dot(k, qt, (1, 0))

    def call(self, *args, **kwargs):
        raise NotImplementedError("Mosaic cannot do this")

    monkeypatch.setattr(splash_blocks.Call, "logits", logits)
    monkeypatch.setattr(fused.Call, "__call__", call)
    assert cli.main(["check", *SMALL, "train.losses=softmax"]) == 1
    text = capsys.readouterr().out
    table = verdicts(text)
    assert {name: table[name] for name in table if table[name] != "not"} == {
        "vision attention xla": "ok",
        "vision attention unpack": "ok",
        "vision attention splash": "differs",
        "vision attention splash_skip": "differs",
        "vision fused_mlp": "does",
        "vision norm_project": "does",
    }
    assert "does not compile: Mosaic cannot do this" in text


def test_a_damaged_checkpoint_is_reported(capsys, monkeypatch):
    from navit.train.checkpoint import Checkpoints

    restore = Checkpoints.restore_model

    def restored(self, like):
        model, step = restore(self, like)
        return jax.tree.map(lambda x: x + 1, model), step

    monkeypatch.setattr(Checkpoints, "restore_model", restored)
    monkeypatch.setattr("navit.machine.verdicts", lambda *args: [])
    assert cli.main(["check", *SMALL]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_an_unknown_field_is_a_one_line_error(capsys):
    assert cli.main(["check", "data.rwos=3"]) == 1
    assert "did you mean 'rows'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data/sample", "no/such/folder"])
def test_decoding_is_measured_with_and_without_the_sample(name, monkeypatch, tmp_path):
    if name != "data/sample":
        monkeypatch.setattr(machine, "_SAMPLE", tmp_path)
    found = machine._decoding(Config())
    assert found["images_per_second"] > 0 and found["megapixels_per_second"] > 0
    assert ("sample" in found["images"]) == (name == "data/sample")
