"""A tower is written in its release's layout, which refuses what it cannot hold."""

import dataclasses

import pytest

from navit import strategies
from navit.cli import main
from navit.convert.native_towers import FAMILIES
from navit.weights import FORMATS, read, write
from tests.convert.test_convert import GOLDEN
from tests.convert.test_native_towers import MERGED, MORE, TIMM


def changed(weights, **vision):
    v = dataclasses.replace(weights.model.vision, **vision)
    return dataclasses.replace(
        weights, model=dataclasses.replace(weights.model, vision=v)
    )


@pytest.mark.parametrize("name", [*MERGED, *MORE, *TIMM])
def test_only_its_own_layout_takes_a_tower(name, tmp_path):
    weights = read(GOLDEN / name)
    for family in FAMILIES:
        out = tmp_path / family
        if family == weights.model.vision.family and name != "qwen3_vl":
            write(changed(weights, family=None), out, family)  # as --format says
            assert read(out).model == weights.model
            continue
        with pytest.raises(ValueError, match="layout ") as error:
            write(weights, out, family)
        assert "\n" not in str(error.value) and not out.exists()


def test_the_family_decides_the_layout_not_the_settings(tmp_path):
    weights = read(GOLDEN / "timm_par")
    assert write(weights, tmp_path / "a") == "timm"
    with pytest.raises(ValueError, match=r"Siglip2Model does not support model\.text="):
        write(changed(weights, family=None), tmp_path / "b")
    kimi = read(GOLDEN / "kimi_vl")
    assert write(kimi, tmp_path / "c", "huggingface") == "moonvit"


def test_the_layouts_of_siglip_have_no_merger(tmp_path):
    weights = read(GOLDEN / "siglip2_b")
    merger = read(GOLDEN / "kimi_vl").model.merger
    model = dataclasses.replace(weights.model, merger=merger)
    for format in ("huggingface", "big_vision"):
        with pytest.raises(ValueError, match=r"does not support model\.merger=Merger"):
            write(dataclasses.replace(weights, model=model), tmp_path / "a", format)


def test_a_setting_or_strategy_that_the_layout_lacks_is_named(tmp_path):
    def refused(weights):
        with pytest.raises(ValueError) as error:
            write(weights, tmp_path / "out")
        return str(error.value)

    kimi = read(GOLDEN / "kimi_vl")
    said = refused(changed(kimi, eps=1e-6))
    assert "MoonViT's layout does not support model.vision.eps=1e-06: write the" in said
    other = dataclasses.replace(kimi, strategy=strategies.QwenVL(4))
    said = refused(other)
    assert "does not support data.strategy=qwen: set data.strategy=kimi, or" in said
    merge = dataclasses.replace(kimi, strategy=strategies.Kimi(4, 100, merge=4))
    assert "does not support data.strategy.merge=4: write" in refused(merge)
    qwen = read(GOLDEN / "qwen2_5_vl")
    said = refused(changed(qwen, window=0, full_blocks=()))
    assert "does not support model.vision.window=0 of a gated tower" in said
    none = dataclasses.replace(kimi, strategy=None)  # trained on token budgets
    write(none, tmp_path / "none")
    assert read(tmp_path / "none").strategy == strategies.Kimi(4, 4096)


def test_the_command_line_has_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "{" + ",".join(FORMATS) + "}" in shown
