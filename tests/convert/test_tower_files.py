"""Files of other native-resolution towers: no bit changed, nothing wrong unsaid."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import navit
from navit import strategies
from navit.cli import main
from navit.convert.stored import shapes_of
from navit.weights import read
from tests.convert.test_convert import GOLDEN, assert_same, expected, tensors_of
from tests.convert.test_native_towers import MERGED, TIMM


def copy(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def change(folder, edit):
    """Stores all tensors in one file, as `edit` changes them."""
    tensors = tensors_of(folder)
    edit(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def plain(tensors):
    """The tensors of the tower, by their names in a release of the tower alone."""
    for prefix in (
        "visual.",
        "model.visual.",
        "vision_tower.",
        "visual_tokenizer.vit.",
    ):
        if any(name.startswith(prefix) for name in tensors):
            tower = prefix, "multi_modal_projector."
            return {n.removeprefix(prefix): x for n, x in tensors.items()
                    if n.startswith(tower)}  # fmt: skip
    return tensors


@pytest.mark.parametrize("name", [*MERGED, "pixtral", "ovis2_5", *TIMM])
def test_round_trip_changes_no_bit(name, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    kind = ["--format", "timm"] if name in TIMM else []
    assert main(["convert", str(GOLDEN / name), str(there), "--format", "navit"]) == 0
    assert main(["convert", str(there), str(back), *kind]) == 0
    assert_same(plain(tensors_of(back)), plain(tensors_of(GOLDEN / name)))
    assert read(back).model == read(GOLDEN / name).model
    again = tmp_path / "again"
    navit.save(navit.load(there), again, *kind[1:])
    assert_same(tensors_of(again), tensors_of(back))
    assert read(again).strategy == read(GOLDEN / name).strategy


def test_moonvit_by_itself_has_no_merger(tmp_path):
    folder = copy("kimi_vl", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["vision_config"]))

    def bare(tensors):
        tower = {n: x for n, x in tensors.items() if n.startswith("vision_tower.")}
        tensors.clear()
        tensors |= {n.removeprefix("vision_tower."): x for n, x in tower.items()}

    change(folder, bare)
    model, want = navit.load(folder), expected("kimi_vl")
    (tokens,) = model.features([want["image"]])
    np.testing.assert_allclose(tokens.reshape(60, -1), want["image_tokens"], atol=5e-5)
    with pytest.raises(ValueError, match="this model has no merger"):
        model.features([want["image"]], merged=True)
    navit.save(model, tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))


@pytest.mark.parametrize("prefix", ["model.visual.", ""])
def test_towers_are_found_under_any_prefix(prefix, tmp_path):
    folder = copy("qwen2_vl", tmp_path)

    def rename(tensors):
        for name in list(tensors):
            if name.startswith("visual."):
                tensors[prefix + name.removeprefix("visual.")] = tensors.pop(name)
            elif not prefix:
                tensors.pop(name)

    change(folder, rename)
    want, got = read(GOLDEN / "qwen2_vl"), read(folder)
    for name in shapes_of(want.model):
        np.testing.assert_array_equal(got.read(name), want.read(name))


def test_bfloat16_files_are_read_exactly(tmp_path):
    folder = copy("qwen2_5_vl", tmp_path)

    def half(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    change(folder, half)
    want, got = read(GOLDEN / "qwen2_5_vl"), read(folder)
    for name in shapes_of(want.model):
        exact = want.read(name).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(got.read(name), exact)


def test_files_without_the_tower_may_be_missing(tmp_path):
    folder = copy("qwen2_vl", tmp_path)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.0.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(data))
    navit.load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 'model-00002-of-00002.* not in"):
        navit.load(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_of_a_7b_model_only_the_tower_is_read(tmp_path):
    """15 GB, of which all but the tower is a hole in the file."""
    folder = copy("qwen2_vl", tmp_path)
    tensors = {n: x for n, x in tensors_of(folder).items() if n.startswith("visual.")}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    header, start = {}, 0
    for name, x in tensors.items():
        place = [start, start := start + x.nbytes]
        header[name] = dict(dtype="F32", shape=x.shape, data_offsets=place)
    big = {"model.layers.weight": 15 * 2**30}
    for name, size in big.items():
        place = [start, start := start + size]
        header[name] = dict(dtype="BF16", shape=[size // 2], data_offsets=place)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.tobytes())
        file.truncate(8 + len(text) + start)
    # By itself: what other tests had in memory would hide a peak. Loading the small
    # file first leaves nothing but the size of the file to tell the two peaks apart.
    code = """
import jax, numpy as np, sys, navit
def load(path):
    model = navit.load(path).model
    lines = open("/proc/self/status").read().splitlines()
    peak = next(x.split()[1] for x in lines if x.startswith("VmHWM"))
    return jax.tree.leaves(model), int(peak)
want, small = load(sys.argv[1])
got, big = load(sys.argv[2])
assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
print(big - small)
"""
    child = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN / "qwen2_vl"), str(folder)],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 64 * 1024  # KiB


def test_what_is_missing_or_unknown_is_named(tmp_path):
    def error(name, edit):
        folder = copy(name, tmp_path)
        change(folder, edit)
        with pytest.raises(ValueError) as found:
            navit.load(folder)
        shutil.rmtree(folder)
        message = str(found.value)
        assert "\n" not in message
        return message

    def only_language(tensors):
        for name in list(tensors):
            if name.startswith("visual."):
                tensors.pop(name)

    said = error("qwen2_vl", only_language)
    assert "has no image tower that navit knows" in said
    assert "config.json says 'qwen2_vl'" in said
    assert "2 tensors, such as lm_head.weight, model.embed_tokens.weight" in said
    lost = "visual.blocks.1.mlp.fc2.bias"
    said = error("qwen2_vl", lambda t: t.pop(lost))
    assert f"its Qwen-VL tower lacks the tensor {lost}: get its files" in said
    extra = {"visual.rope.freqs": np.zeros(3, np.float32)}
    said = error("qwen2_vl", lambda t: t.update(extra))
    assert "1 tensors that navit does not know, first visual.rope.freqs" in said
    shape = {"embeds.reg_token": np.zeros((1, 4, 23), np.float32)}
    said = error("timm_gap", lambda t: t.update(shape))
    assert "embeds.reg_token is (1, 4, 23), but the other tensors make it" in said


def test_sizes_of_a_work_directory_stay_as_they_are(tmp_path):
    """Before orbax compares arrays, which says nothing of settings."""
    out = str(tmp_path / "run")
    assert main(["convert", str(GOLDEN / "kimi_vl"), out, "--format", "navit"]) == 0
    for setting in ("model.merger.out_dim=8", "model.vision.mlp_dim=8"):
        key = setting.partition("=")[0]
        with pytest.raises(ValueError, match=rf"was trained otherwise \({key}: "):
            navit.load(out, overrides=[setting])
    with pytest.raises(ValueError, match=r"model\.merger is none, so it has no field"):
        navit.load(GOLDEN / "timm_gap", overrides=["model.merger.out_dim=8"])


def test_deepstack_is_left_out_and_not_written(tmp_path):
    model = navit.load(GOLDEN / "qwen3_vl")
    assert model.config.data.strategy == strategies.QwenVL(
        4, 2, min_pixels=256, max_pixels=1600
    )
    with pytest.raises(ValueError, match="deepstack mergers, which navit leaves out"):
        navit.save(model, tmp_path / "out")


def test_of_another_projector_the_tower_is_read(tmp_path):
    """Mistral Small 3.1's, which merges in another way."""
    folder = copy("pixtral", tmp_path)
    name = "multi_modal_projector.patch_merger.merging_layer.weight"
    change(folder, lambda t: t.update({name: np.zeros((24, 96), np.float32)}))
    assert navit.load(folder).config.model.merger is None
