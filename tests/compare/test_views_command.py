"""`navit views`: strategies side by side, as a table and as a picture."""

import contextlib
import io
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from navit import cli, strategies
from navit.compare.candidates import candidates, config_line, label, parse
from navit.config import Config, override
from navit.plan.strategies import BY_NAME

SAMPLE = Path(__file__).parents[2] / "data/sample"


def run(*args):
    """A command's exit status, output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(x) for x in args])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def row_of(text, name):
    (line,) = [x for x in text.splitlines() if x.split()[:1] == [name]]
    return line.split()


def test_sizes_are_width_times_height():
    status, out, _ = run("views", "600x1500", "--strategy", "internvl,qwen,anyres")
    assert status == 0 and "600x1500 pixels (width x height)" in out
    for name, tokens in (("internvl", 2818), ("qwen", 1136), ("anyres", 2076)):
        assert row_of(out, name)[3] == str(tokens)
    assert row_of(out, "internvl")[1:3] == ["11", str(11 * 1024)]


def test_a_refused_size_is_said_and_the_others_go_on():
    status, out, _ = run("views", "40x9000", "--strategy", "kimi,qwen,square")
    assert status == 0
    assert "refused" in " ".join(row_of(out, "qwen")) and "225:1" in out
    assert row_of(out, "square")[3] == "576"


def test_files_and_sizes_are_drawn(tmp_path):
    out = tmp_path / "views.png"
    names = "internvl:max_tiles=6,anyres,llava_mini,square:fit=crop,kimi"
    status, text, err = run(
        *["views", SAMPLE / "coffee_rotated.jpg", "40x9000", "--strategy", names],
        *["--object", "20x200", "--patch", "14", "--model", "B", "--out", out],
    )
    assert status == 0, err
    assert text.endswith(f"wrote {out}\n")
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 200
    for color in ((214, 39, 40), (31, 78, 121)):  # cuts, and edges of single views
        assert (abs(pixels - color).max(-1) < 30).sum() > 100


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["600x1500", "--strategy", "internvll"], "did you mean 'internvl'"),
        (["600x1500", "--strategy", "internvl:tils=3"], "did you mean 'tile'"),
        (["600x1500", "--strategy", "internvl:max_tiles"], "has no value"),
        (["600x1500", "--strategy", "max_tiles=3"], "begin with a name"),
        (["600x1500", "--strategy", "internvl:max_tiles=0"], "whole number above 0"),
        (["600x1500", "--strategy", "anyres:canvases=big"], "ROWSxCOLUMNS"),
        (["600x1500", "--strategy", ","], "no strategy"),
        (["600x0"], "has no pixels"),
        (["600x1500", "--model", "XL"], "choose one of Ti"),
        (["nowhere.jpg"], "there is no file nowhere.jpg"),
        ([SAMPLE / "README.md"], "cannot read"),
    ],
)
def test_a_mistake_gets_one_line(args, said):
    status, _, err = run("views", *args)
    assert status == 1
    assert said in err and err.count("\n") == 1, err


def test_a_bad_object_is_a_usage_error():
    status, _, err = run("views", "600x1500", "--object", "64")
    assert status == 2 and "WIDTHxHEIGHT" in err


@pytest.mark.parametrize("name", BY_NAME)
def test_a_label_and_a_config_line_make_the_same_strategy(name):
    for strategy in [strategies.by_name(name), *candidates(name)]:
        assert parse(label(strategy)) == [strategy]
        words = shlex.split(config_line(strategy))
        patch = f"model.vision.patch_size={strategy.patch}"
        config = override(Config(), [*words, patch, "data.row_tokens=8192"])
        assert config.data.strategy == strategy


def test_fields_and_lists_are_told_apart():
    text = "anyres:canvases=((672,336),(336,672)),shrink_above=none,qwen, internvl"
    first, *others = parse(text, patch=28)
    assert first.canvases == ((672, 336), (336, 672)) and first.shrink_above is None
    assert others == [strategies.QwenVL(28), strategies.InternVL(patch=28)]
    assert parse("internvl:thumbnail=false")[0].thumbnail is False
    assert parse("naflex:patch=14", patch=16) == [strategies.NaFlex(14)]
