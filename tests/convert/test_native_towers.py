"""Other native-resolution towers: the originals' numbers, and no bit changed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import navit
from navit import strategies
from navit.batch import PackedImages, PackedTokens
from navit.cli import main
from navit.config import Config, ModelConfig, TextConfig, override
from navit.config.towers import starting_from
from navit.convert.stored import build, shapes_of
from navit.model import rotary
from navit.model.windows import window_ids
from navit.weights import read
from tests.convert.test_convert import assert_same, expected, tensors_of

GOLDEN = Path(__file__).parents[1] / "golden"
MERGED = ["kimi_vl", "qwen2_vl", "qwen2_5_vl"]
MORE = ["qwen3_vl", "pixtral", "ovis2_5"]
SMALL_TEXT = TextConfig(length=9, width=16, depth=1, mlp_dim=16, num_heads=2)
TIMM = ["timm_gap", "timm_par", "timm_parfac", "timm_siglip"]


def in_rows(images, rows):
    """Images (patches, grid) in rows, as the lists of their numbers say."""
    most = max(sum(len(images[i][0]) for i in row) for row in rows) + 5
    slots = max(map(len, rows)) + 1
    out = PackedImages(
        np.zeros((len(rows), most, images[0][0].shape[1]), np.float32),
        np.zeros((len(rows), most), np.int32),
        np.zeros((len(rows), most, 2), np.int32),
        np.zeros((len(rows), slots, 2), np.int32),
    )
    for b, row in enumerate(rows):
        start = 0
        for slot, i in enumerate(row):
            patches, grid = images[i]
            tokens = slice(start, start := start + len(patches))
            out.patches[b, tokens] = patches
            out.segment_ids[b, tokens] = slot + 1
            out.coords[b, tokens] = np.indices(tuple(grid)).reshape(2, -1).T
            out.grids[b, slot] = grid
    out.check()
    return out


def layouts(count):
    yield [[i] for i in range(count)]
    yield [list(range(count))]
    yield [list(range(count))[::-1]]


@pytest.fixture(scope="module", params=[*MERGED, *MORE, *TIMM])
def tower(request):
    model, want = navit.load(GOLDEN / request.param), expected(request.param)
    images = [(want[f"patches_{i}"], g) for i, g in enumerate(want["grids"])]

    @jax.jit
    def encode(packed):
        out = model.vision(packed)
        merged = None if model.model.merger is None else model.merger(out.packed)
        return out, merged

    return encode, want, images


def test_tokens_equal_the_originals_alone_and_packed(tower):
    encode, want, images = tower
    for rows in layouts(len(images)):
        packed = in_rows(images, rows)
        out, merged = jax.tree.map(np.asarray, encode(packed))
        for b, row in enumerate(rows):
            for slot, i in enumerate(row):
                own = packed.segment_ids[b] == slot + 1
                got = {
                    "tokens": out.packed.tokens[b, own],
                    "pooled": out.pooled[b, slot],
                }
                if out.logits is not None:
                    got["logits"] = out.logits[b, slot]
                if merged is not None:
                    got["merged"] = merged.tokens[b, merged.segment_ids[b] == slot + 1]
                    got["merged"] = got["merged"].reshape(want[f"merged_{i}"].shape)
                    assert merged.grids[b, slot].tolist() == [*got["merged"].shape[:2]]
                for name, value in got.items():
                    if f"{name}_{i}" in want:
                        np.testing.assert_allclose(
                            value, want[f"{name}_{i}"], atol=5e-5, err_msg=name
                        )


@pytest.mark.parametrize("name", MERGED)
def test_images_become_the_pixels_that_the_original_gets(name):
    """Mean and std, padding, the processor's bounds: `features` needs no settings."""
    model, want = navit.load(GOLDEN / name), expected(name)
    (tokens,) = model.features([want["image"]])
    assert tokens.shape[:2] == (6, 10)
    flat = tokens.reshape(60, -1)
    np.testing.assert_allclose(flat, want["image_tokens"], atol=5e-5)
    (merged,) = model.features([want["image"]], merged=True)
    np.testing.assert_allclose(merged, want["image_merged"], atol=5e-5)
    (whole,) = model.features(
        [want["image"]], strategy=model.config.data.strategy, merged=True
    )
    np.testing.assert_array_equal(whole[0].tokens, merged)
    (fewer,) = model.features([want["image"]], max_tokens=30, merged=True)
    assert fewer.shape[0] * fewer.shape[1] < merged.shape[0] * merged.shape[1]
    mean = tokens.mean((0, 1))
    z = model.embed_images([want["image"]])[0]
    np.testing.assert_allclose(z, mean / np.linalg.norm(mean), atol=5e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_clip_equals_transformers(name):
    """Patches of two frames, which attend within their own patch in time."""
    model, want = navit.load(GOLDEN / name), expected(name)
    packed = in_rows([(patches, (6, 4)) for patches in want["clip"]], [[1, 0]])
    merged = model.merger(model.vision(packed).packed)
    for slot, i in enumerate((1, 0)):
        got = merged.tokens[0, merged.segment_ids[0] == slot + 1]
        np.testing.assert_allclose(
            got.reshape(3, 2, -1), want["clip_merged"][i], atol=5e-5
        )


def test_the_merger_joins_blocks_of_each_frame_and_refuses_odd_grids():
    """A clip in one segment gives what its frames give by themselves."""
    module = navit.load(GOLDEN / "kimi_vl").merger
    merger = jax.jit(lambda packed: module(packed))
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((3, 8, 24)).astype(np.float32)
    coords = np.indices((3, 2, 4)).reshape(3, -1).T.astype(np.int32)
    mixed = rng.permutation(24)
    clip = PackedTokens(
        frames.reshape(1, 24, -1)[:, mixed],
        np.ones((1, 24), np.int32),
        coords[None, mixed],
        np.array([[[3, 2, 4]]], np.int32),
    )
    apart = PackedTokens(
        frames, np.ones((3, 8), np.int32), coords.reshape(3, 8, 3)[..., 1:],
        np.array([[[2, 4]]] * 3, np.int32),
    )  # fmt: skip
    together, alone = merger(clip), merger(apart)
    np.testing.assert_allclose(
        together.tokens.reshape(3, 2, -1), alone.tokens, atol=1e-6
    )
    assert together.coords[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert together.grids.tolist() == [[[3, 1, 2]]]
    odd = apart._replace(grids=np.array([[[1, 8]]] * 3, np.int32))
    with pytest.raises(ValueError, match="a grid of 1x8 patches is not made of 2x2"):
        module(odd)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_turns_and_windows_equal_transformers(name):
    """Cosines and sines to a bit's rounding: angles are equal (`test_rotary.py`)."""
    want, vision = expected(name), read(GOLDEN / name).model.vision
    for i, grid in enumerate(want["grids"]):
        coords = np.indices(tuple(grid)).reshape(2, -1).T[None].astype(np.int32)
        np.testing.assert_array_equal(coords[0], want[f"positions_{i}"])
        width = vision.width // vision.num_heads
        coords, own = jnp.asarray(coords), jnp.broadcast_to(grid, coords.shape)
        turn = rotary.rotation(vision.rotary, coords, own, width)
        for part in ("cos", "sin"):
            got = np.tile(getattr(turn, part)[0], 2)
            np.testing.assert_array_max_ulp(got, want[f"{part}_{i}"], maxulp=1)
        if vision.window:
            ids = jnp.ones(coords.shape[:2], jnp.int32)
            got = window_ids(ids, coords, jnp.array(grid[None, None]), vision.window)[0]
            same = want[f"windows_{i}"]
            np.testing.assert_array_equal(
                np.asarray(got)[:, None] == np.asarray(got), same[:, None] == same
            )


def plain(tensors):
    """The tensors of the tower, by their names in a release of the tower alone."""
    for prefix in ("visual.", "vision_tower.", "visual_tokenizer.vit."):
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


def copy(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def change(folder, edit):
    """Stores all tensors in one file, as `edit` changes them."""
    tensors = tensors_of(folder)
    edit(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


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
    def error(name, edit, config=None):
        folder = copy(name, tmp_path)
        change(folder, edit)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
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
    assert f"lacks the tensor {lost}" in error("qwen2_vl", lambda t: t.pop(lost))
    extra = {"visual.rope.freqs": np.zeros(3, np.float32)}
    said = error("qwen2_vl", lambda t: t.update(extra))
    assert "1 tensors that navit does not know, first visual.rope.freqs" in said
    shape = {"embeds.reg_token": np.zeros((1, 4, 23), np.float32)}
    said = error("timm_gap", lambda t: t.update(shape))
    assert "embeds.reg_token is (1, 4, 23), but the other tensors make it" in said
    config = json.loads((GOLDEN / "qwen2_vl/config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    said = error("qwen2_vl", lambda t: None, config)
    assert "hidden_act='relu' is not supported; navit knows 'quick_gelu'" in said
    config["vision_config"] |= dict(hidden_act="quick_gelu", num_heads="x")
    said = error("qwen2_vl", lambda t: None, config)
    assert "num_heads is 'x', but should be a number" in said


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


def test_a_layout_refuses_what_it_cannot_hold(tmp_path):
    model = navit.load(GOLDEN / "kimi_vl")
    vision = dataclasses.replace(model.config.model.vision, eps=1e-6)
    changed = dataclasses.replace(model.config.model, vision=vision)
    config = dataclasses.replace(model.config, model=changed)
    model = navit.Embedder(model.model, config, step=0)
    message = r"MoonViT's layout does not support model.vision.eps=1e-06: write the"
    with pytest.raises(ValueError, match=message):
        navit.save(model, tmp_path / "out")


def test_a_text_tower_that_starts_at_random_is_not_frozen():
    weights = read(GOLDEN / "qwen2_vl")
    config = Config(init="a", init_towers=True)
    started = starting_from(config, weights.model, where="a")
    assert started.model.text == config.model.text and started.model.merger is None
    config = override(config, ["optim.text_lr=0"])
    with pytest.raises(ValueError, match="a has no text tower, so that of the run"):
        starting_from(config, weights.model, where="a")
    towers = ModelConfig(vision=weights.model.vision, text=SMALL_TEXT)
    one, other = (build(weights, towers, seed=seed) for seed in (0, 1))
    same = jax.tree.map(np.array_equal, one, other)
    assert all(jax.tree.leaves(same.vision)) and not all(jax.tree.leaves(same.text))


def test_embed_takes_the_towers_own_pixels(tmp_path):
    from PIL import Image

    image = expected("qwen2_vl")["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    out = tmp_path / "z.npz"
    command = ["embed", str(GOLDEN / "qwen2_vl"), str(tmp_path / "a.png")]
    assert main([*command, "--out", str(out)]) == 0
    model = navit.load(GOLDEN / "qwen2_vl")
    with np.load(out) as found:
        np.testing.assert_allclose(
            found["embeddings"], model.embed_images([image]), atol=1e-6
        )


SMALL = [
    "data.train.path=data/sample",
    "data.rows=4",
    "mesh.data=1",
    "data.budgets=16,36",
    "data.row_tokens=64",
    "eval.budgets=16",
    "optim.warmup_steps=0",
    "train.steps=1",
]


@pytest.mark.parametrize("name", ["kimi_vl", "qwen2_5_vl", "timm_par"])
def test_training_goes_on_with_a_text_tower_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN.parents[1])
    text = ["tokenizer=bytes", "vocab_size=258", "length=9", "width=16", "depth=1"]
    code = main(
        [
            "train",
            "configs/siglip2_naflex_finetune.py",
            f"init={GOLDEN / name}",
            *SMALL,
            *(f"model.text.{x}" for x in [*text, "mlp_dim=16", "num_heads=2"]),
            "optim.vision_lr=0",
            "optim.text_lr=1",
            "--workdir",
            str(tmp_path),
        ]
    )
    assert code == 0
    before, after = navit.load(GOLDEN / name).model, navit.load(tmp_path)
    for a, b in zip(jax.tree.leaves(before.vision), jax.tree.leaves(after.vision),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    assert after.embed_texts(["a cat"]).shape == (1, after.embed_dim)
