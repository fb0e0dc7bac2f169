"""Which tower a directory has, what is missing of it, and what navit leaves out."""

import dataclasses
import json

import numpy as np
import pytest

import navit
from navit import strategies
from navit.cli import main
from navit.convert.stored import shapes_of
from navit.weights import read
from tests.convert.test_convert import GOLDEN, assert_same, tensors_of
from tests.convert.test_tower_files import change, copy, plain

MARKERS = {
    "kimi_vl": ["vision_tower.patch_embed.proj.weight"],
    "qwen2_vl": ["visual.patch_embed.proj.weight"],
    "qwen2_5_vl": ["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"],
    "pixtral": ["vision_tower.ln_pre.weight"],
    "timm_gap": ["embeds.proj.weight"],
    "ovis2_5": ["visual_tokenizer.vit.vision_model.embeddings.patch_embedding.weight"],
}


@pytest.mark.parametrize("name", MARKERS)
def test_of_a_part_of_a_tower_the_missing_tensors_are_named(name, tmp_path):
    """Also those by which a tower is told from others."""
    folder, lost = copy(name, tmp_path), MARKERS[name]
    change(folder, lambda t: [t.pop(x) for x in lost])
    with pytest.raises(ValueError, match=r"a part of the tower of .*, but lacks") as e:
        read(folder)
    assert all(x in str(e.value) for x in lost) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_qwen_tower_may_lack_its_merger(name, tmp_path):
    folder = copy(name, tmp_path)

    def bare(tensors):
        for name in [x for x in tensors if "merger" in x]:
            tensors.pop(name)

    change(folder, bare)
    weights, whole = read(folder), read(GOLDEN / name)
    assert weights.model == dataclasses.replace(whole.model, merger=None)
    back = tmp_path / "back"
    assert main(["convert", str(folder), str(back)]) == 0
    assert_same(plain(tensors_of(back)), plain(tensors_of(folder)))
    assert read(back).model == weights.model
    assert read(back).strategy == weights.strategy
    assert navit.load(folder).model.merger is None


def test_a_plain_vit_is_no_qwen_tower(tmp_path):
    """timm's ViTs share most of its names."""
    folder = copy("qwen2_5_vl", tmp_path)

    def other(tensors):
        for name in [x for x in tensors if x.startswith("merger.")]:
            tensors.pop(name)
        tensors["norm.weight"] = np.ones(24, np.float32)

    change(folder, other)
    with pytest.raises(ValueError, match="has no image tower that navit knows"):
        read(folder)


def test_of_two_towers_one_must_be_chosen(tmp_path):
    folder = copy("kimi_vl", tmp_path)
    other = tensors_of(GOLDEN / "timm_par")
    change(folder, lambda t: t.update({f"aux.{n}": x for n, x in other.items()}))
    match = r"2 image towers: moonvit \(vision_tower\.\), timm \(aux\.\): choose one"
    with pytest.raises(ValueError, match=match):
        read(folder)
    chosen = read(folder, overrides=["model.vision.family=moonvit"])
    assert chosen.model == read(GOLDEN / "kimi_vl").model


def test_a_family_that_the_directory_lacks_is_refused():
    with pytest.raises(ValueError, match=r"no tower of model\.vision\.family=qwen_vl"):
        read(GOLDEN / "pixtral", overrides=["model.vision.family=qwen_vl"])


def test_the_projector_of_kimi_k25_is_read(tmp_path):
    """Its config has other names, and its processor's settings are in an object."""
    folder = copy("kimi_vl", tmp_path)
    names = {"pre_norm": "pre_norm", "linear_1": "proj.0", "linear_2": "proj.2"}

    def rename(tensors):
        for name in [x for x in tensors if x.startswith("multi_modal")]:
            _, layer, part = name.split(".")
            tensors[f"mm_projector.{names[layer]}.{part}"] = tensors.pop(name)

    change(folder, rename)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        vision[f"vt_{key}"] = vision.pop(key)
    vision["vt_num_attention_heads"] = vision.pop("num_attention_heads")
    vision["projector_ln_eps"] = 1e-4
    config = {"model_type": "kimi_k25", "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"in_patch_limit": 77, "patch_size": 4, "merge_kernel_size": 2}
    processor = {"media_proc_cfg": pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    weights, want = read(folder), read(GOLDEN / "kimi_vl")
    merger = dataclasses.replace(want.model.merger, eps=1e-4)
    assert weights.model == dataclasses.replace(want.model, merger=merger)
    assert weights.strategy == strategies.Kimi(4, 77)
    for name in shapes_of(want.model):
        np.testing.assert_array_equal(weights.read(name), want.read(name))


@pytest.mark.parametrize(
    ("name", "added", "said"),
    [
        ("qwen3_vl", None, "its deepstack mergers"),
        ("ovis2_5", None, "its head"),
        ("kimi_vl", "mm_projector.post_norm.weight", "its projector"),
        ("pixtral", "multi_modal_projector.patch_merger.a", "its projector, which"),
    ],
)
def test_what_is_left_out_is_said(name, added, said, tmp_path, caplog):
    folder = copy(name, tmp_path)
    if added:
        kimi = [
            x for x in tensors_of(folder) if x.startswith("multi_") and "post" in added
        ]

        def other(tensors):
            for lost in kimi:
                tensors.pop(lost)
            tensors[added] = np.zeros(2, np.float32)

        change(folder, other)
    read(folder)
    assert f"{folder}: navit leaves out {said}" in caplog.text
