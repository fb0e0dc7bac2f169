"""`navit budget`: a workload and a number of tokens become a choice for each kind."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_views_command import run

from navit.config import DataConfig, override

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "data/workloads/example.csv"
KINDS = ("receipt", "chart", "photograph", "video")


def spent_of(out):
    return int(re.search(r"^tokens: ([\d,]+) of", out, re.M)[1].replace(",", ""))


def choices_of(out):
    found = re.findall(r"^(\w+): (data\.strategy=.*)$", out, re.M)
    return {
        kind: override(
            DataConfig(), [word.removeprefix("data.") for word in shlex.split(line)]
        ).strategy
        for kind, line in found
    }


def test_the_example_keeps_its_budget_and_gains_with_it(tmp_path):
    details = []
    for tokens in (1_000_000, 1_500_000, 2_500_000):
        status, out, err = run("budget", EXAMPLE, "--tokens", tokens)
        assert status == 0, err
        assert spent_of(out) <= tokens
        assert tuple(choices_of(out)) == KINDS
        assert out.count("\n* ") == len(KINDS)  # one choice of each kind is marked
        details.append(float(re.search(r"mean detail: ([\d.]+)", out)[1]))
    assert details == sorted(details) and details[0] < details[-1]


def test_the_lines_are_strategies_that_cost_what_the_table_says():
    _, out, _ = run("budget", EXAMPLE, "--tokens", "2.5M")
    chosen = choices_of(out)
    rows = [x.split(",") for x in EXAMPLE.read_text().split()[1:]]
    spent = 0
    for kind, size, count, _scale, frames in rows:
        width, height = map(int, size.split("x"))
        tokens = chosen[kind].tokens(height, width)
        spent += int(count) * int(frames or 1) * tokens
    assert spent == spent_of(out)


def test_a_plot_is_written(tmp_path):
    out = tmp_path / "budget.png"
    status, text, err = run(
        *["budget", EXAMPLE, "--tokens", "4M", "--strategy", "qwen,minicpm_v:tile=336"],
        *["--out", out],
    )
    assert status == 0, err
    assert text.endswith(f"wrote {out}\n")
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert (abs(pixels - (214, 39, 40)).max(-1) < 30).sum() > 50  # the choices


def test_a_folder_has_a_kind_for_each_subfolder(tmp_path):
    for kind in ("cats", "walls"):
        (tmp_path / kind).mkdir()
    shutil.copy(ROOT / "data/sample/cat.jpg", tmp_path / "cats/a.jpg")
    shutil.copy(ROOT / "data/sample/cat.jpg", tmp_path / "cats/b.jpg")
    shutil.copy(ROOT / "data/sample/brick_wide.jpg", tmp_path / "walls/c.jpg")
    status, out, err = run("budget", tmp_path, "--tokens", "2k", "--strategy", "naflex")
    assert status == 0, err
    assert "cats: 2 requests\n" in out and "walls: 1 request\n" in out


def test_json_and_csv_are_the_same_workload(tmp_path):
    rows = [
        {"kind": "a", "size": "600x1500", "count": 3},
        {"kind": "b", "image": "cat.jpg", "scale": 0.5},
    ]
    shutil.copy(ROOT / "data/sample/cat.jpg", tmp_path)
    (tmp_path / "w.json").write_text(json.dumps(rows))
    (tmp_path / "w.csv").write_text(
        "kind,size,image,count,scale\na,600x1500,,3,\nb,,cat.jpg,,0.5\n"
    )
    said = [
        run("budget", tmp_path / name, "--tokens", "5k", "--strategy", "qwen")
        for name in ("w.json", "w.csv")
    ]
    assert said[0] == said[1] and said[0][0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind,size\n", "has no requests"),
        ("", "has no requests"),
        ("kind,count\nreceipt,3\n", "row 1: it must have a column size"),
        ("size,image\n3x4,a.jpg\n", "only one of them"),
        ("size,frame\n3x4,2\n", "no column 'frame'; did you mean frames?"),
        ("size\n600\n", "size must be WIDTHxHEIGHT"),
        ("size\n600x0\n", "has no pixels"),
        ("size,count\n3x4,1\n3x4,some\n", "row 2: count must be a whole number"),
        ("size,scale\n3x4,nan\n", "scale must be a number"),
        ("image\nnowhere.jpg\n", "there is no file"),
        ("kind,size,scale\npage,2000x3000,0.9\n", "none of 7 candidates will do"),
        ("size,count\n600x1500,1000\n", "takes at least"),
    ],
)
def test_a_mistake_in_a_workload_gets_one_line(tmp_path, text, said):
    file = tmp_path / "w.csv"
    file.write_text(text)
    status, _, err = run("budget", file, "--tokens", 1000, "--strategy", "naflex")
    assert status == 1
    assert said in err and err.count("\n") == 1, err


def test_other_mistakes_get_one_line(tmp_path):
    assert "there is no workload" in run("budget", tmp_path / "w", "--tokens", 9)[2]
    (tmp_path / "w.json").write_text("{")
    assert "is no table" in run("budget", tmp_path / "w.json", "--tokens", 9)[2]
    (tmp_path / "w.json").write_text("{}")
    assert "a list of objects" in run("budget", tmp_path / "w.json", "--tokens", 9)[2]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/bad.jpg").write_bytes(b"no image")
    assert "cannot read" in run("budget", tmp_path / "x", "--tokens", 9)[2]
    status, _, err = run("budget", EXAMPLE, "--tokens", "many")
    assert status == 2 and "4M" in err
