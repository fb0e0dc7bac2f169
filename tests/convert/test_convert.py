"""Released-weight formats: transformers' numbers, and no bit changed on the way."""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from safetensors import safe_open

import navit
from navit.batch import PackedImages
from navit.cli import main
from navit.convert import shards
from navit.convert.stored import shapes_of
from navit.input.tokens import encode
from navit.weights import read, write

GOLDEN = Path(__file__).parents[1] / "golden"
NAFLEX = ["siglip2_a", "siglip2_b"]
FIXED = ["siglip_fixed", "siglip_cut"]
ALL = [*NAFLEX, *FIXED]


def expected(name):
    with np.load(GOLDEN / name / "expected.npz") as found:
        return dict(found)


LAYOUTS = {
    "alone": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "packed": [[0, 1, 6], [2, 3, 7], [4, 5]],
    "another order": [[6, 7, 5, 4, 3], [2, 1, 0]],
}


def pack(images, layout):
    """Eight images (patches, grid) in rows, of one shape for all layouts."""
    lengths = [len(patches) for patches, _ in images]
    rows = [row for each in LAYOUTS.values() for row in each]
    n = max(sum(lengths[i] for i in row) for row in rows) + 3
    out = PackedImages(
        np.zeros((8, n, images[0][0].shape[1]), np.float32),
        np.zeros((8, n), np.int32),
        np.zeros((8, n, 2), np.int32),
        np.zeros((8, 5, 2), np.int32),
    )
    for b, row in enumerate(LAYOUTS[layout]):
        start = 0
        for slot, i in enumerate(row):
            patches, grid = images[i]
            stop = start + len(patches)
            out.patches[b, start:stop] = patches
            out.segment_ids[b, start:stop] = slot + 1
            out.coords[b, start:stop] = np.indices(tuple(grid)).reshape(2, -1).T
            out.grids[b, slot] = grid
            start = stop
    out.check()
    return out


def each_image(out, packed, layout):
    """(number, tokens, pooled vector) of each image."""
    tokens, pooled = np.asarray(out.tokens), np.asarray(out.pooled)
    for b, row in enumerate(LAYOUTS[layout]):
        for slot, i in enumerate(row):
            yield i, tokens[b, packed.segment_ids[b] == slot + 1], pooled[b, slot]


@pytest.fixture(scope="module", params=NAFLEX)
def naflex(request):
    """A model, its compiled image tower, transformers' numbers, and its images."""
    want = expected(request.param)
    images = [(want[f"patches_{i}"], g) for i, g in enumerate(want["grids"])]
    model = navit.load(GOLDEN / request.param)
    return model, jax.jit(lambda packed: model.vision(packed)), want, images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_equal_transformers(naflex, layout):
    _, encode, want, images = naflex
    packed = pack(images, layout)
    for i, tokens, pooled in each_image(encode(packed), packed, layout):
        np.testing.assert_allclose(tokens, want[f"tokens_{i}"], atol=5e-5)
        np.testing.assert_allclose(pooled, want[f"pooled_{i}"], atol=5e-5)


def test_texts_and_logits_equal_transformers(naflex):
    model, encode, want, images = naflex
    t = np.asarray(jax.jit(lambda ids: model.text(ids))(want["ids"]))
    np.testing.assert_allclose(t, want["text"], atol=5e-5)
    z = np.asarray(encode(pack(images, "alone")).pooled)[:, 0]
    z, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, t))
    np.testing.assert_allclose(model.logits(z, t), want["logits"], atol=5e-5)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_resolution_equals_transformers(name):
    model, want = navit.load(GOLDEN / name), expected(name)
    assert model.config.model.vision.fixed_grid
    z = model.embed_images(list(want["pixels"]))
    pooled = want["pooled"] / np.linalg.norm(want["pooled"], axis=-1, keepdims=True)
    np.testing.assert_allclose(z, pooled, atol=5e-5)
    t = np.asarray(jax.jit(lambda ids: model.text(ids))(want["ids"]))
    np.testing.assert_allclose(t, want["text"], atol=5e-5)
    t = t / np.linalg.norm(t, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.logits(z, t), want["logits"], atol=5e-5)


def test_fixed_resolution_takes_every_image_to_its_grid():
    model = navit.load(GOLDEN / "siglip_fixed")
    wide = np.zeros((10, 90, 3), np.uint8)
    assert model.embed_images([wide]).shape == (1, 36)
    with pytest.raises(ValueError, match=r"5x5 patches: pass max_tokens=25"):
        model.embed_images([wide], max_tokens=24)
    free = ["model.vision.fixed_grid=false"]
    flexible = navit.load(GOLDEN / "siglip_fixed", overrides=free)
    assert flexible.embed_images([wide], max_tokens=24).shape == (1, 36)


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", ["big_vision", "navit", "save"])
def test_round_trip_changes_no_bit(name, way, tmp_path):
    """Hugging Face -> the other -> Hugging Face."""
    back = tmp_path / "back"
    if way == "save":
        navit.save(navit.load(GOLDEN / name), back)
    else:
        between = tmp_path / ("there.npz" if way == "big_vision" else "there")
        options = ["--format", way]
        assert main(["convert", str(GOLDEN / name), str(between), *options]) == 0
        assert main(["convert", str(between), str(back)]) == 0
    assert_same(tensors_of(back), tensors_of(GOLDEN / name))
    # As transformers wrote it, except for its default.
    want, found = (
        json.loads((folder / "config.json").read_text())
        for folder in (GOLDEN / name, back)
    )
    assert want["vision_config"].pop("vision_use_head") is True
    if way == "big_vision" and name == "siglip_cut":  # which an .npz cannot record
        want["vision_config"]["image_size"] = 20
    assert found == want


@pytest.mark.parametrize("scanned", [(False, True), (True, True), (False, False)])
def test_big_vision_layouts_scanned_or_not(scanned, tmp_path):
    """Any combination gives the same tensors; the public one is (False, True)."""
    file = tmp_path / "a.npz"
    navit.save(navit.load(GOLDEN / "siglip2_b"), file, "big_vision")
    with np.load(file, allow_pickle=False) as found:
        arrays = dict(found)
    img, txt = "params/img/Transformer/encoderblock", "params/txt/Encoder_0/"
    query, out = (
        f"{img}_{i}/MultiHeadDotProductAttention_0/{name}/kernel"
        for i, name in ((0, "query"), (2, "out"))
    )
    assert arrays[query].shape == (30, 3, 10)
    assert arrays[out].shape == (3, 10, 30)
    assert arrays["params/img/pos_embedding"].shape == (7, 7, 30)
    assert arrays["params/img/embedding/kernel"].shape == (27, 30)
    assert arrays[f"{txt}encoderblock/LayerNorm_0/scale"].shape == (1, 21)
    assert arrays["params/txt/pos_embedding"].shape == (1, 9, 21)
    assert arrays["params/t"].shape == arrays["params/b"].shape == (1,)
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    for prefix, stack in ((img, scanned[0]), (f"{txt}encoderblock", scanned[1])):
        restack(arrays, prefix, stack)
    np.savez(file, **arrays)
    stacked, weights = read(file), read(GOLDEN / "siglip2_b")
    for name in shapes_of(weights.model):
        np.testing.assert_array_equal(stacked.read(name), weights.read(name))
    navit.save(navit.load(file), tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(GOLDEN / "siglip2_b"))


def restack(arrays, prefix, stack):
    """Stacks the blocks under `prefix`, or takes the stack apart."""
    blocks = {n: arrays.pop(n) for n in list(arrays) if n.startswith(prefix)}
    if not any(n.startswith(prefix + "/") for n in blocks):
        tails = {n.removeprefix(prefix).partition("/")[2] for n in blocks}
        depth = len(blocks) // len(tails)
        blocks = {
            f"{prefix}/{t}": np.stack(
                [blocks[f"{prefix}_{i}/{t}"] for i in range(depth)]
            )
            for t in tails
        }
    for name, value in blocks.items():
        if stack:
            arrays[name] = value
        else:
            for i, one in enumerate(value):
                arrays[f"{prefix}_{i}{name.removeprefix(prefix)}"] = one


def copy(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def change(folder, edit):
    """Rewrites a directory's tensors after `edit(tensors)`."""
    tensors = tensors_of(folder)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


PROBE = "vision_model.head.probe"
TABLE = "vision_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(PROBE), rf"lacks the tensor {PROBE}"),
        (lambda t: t.update(more=np.zeros(3, np.float32)), "not know, first more"),
        (
            lambda t: t.update({PROBE: t[PROBE][..., 1:]}),
            rf"{PROBE} is \(1, 1, 29\), .* \(1, 1, 30\)",
        ),
        (
            lambda t: t.update({TABLE: t[TABLE][1:]}),
            "position_embedding has 48 positions, which is not a square",
        ),
        (
            lambda t: t.update({PROBE: t[PROBE].astype(np.int32)}),
            rf"{PROBE} is I32, but weights must be F32, F16, BF16",
        ),
    ],
)
def test_wrong_tensors_are_named(edit, message, tmp_path):
    folder = copy("siglip2_b", tmp_path)
    change(folder, edit)
    with pytest.raises(ValueError, match=message):
        navit.load(folder)


def test_nearly_right_names_are_named(tmp_path):
    """Depth is counted in whole names only."""
    folder = copy("siglip2_b", tmp_path)
    for name, message in [
        ("ema.vision_model.encoder.layers.7.mlp.fc1.weight", "not know, first ema"),
        ("vision_model.encoder.layers.x.mlp.fc1.weight", "not know, first .*layers.x"),
        ("vision_model.encoder.layers.99999999999.mlp.fc1.weight", "layers.3"),
        ("text_model.position_ids_too", "not know, first text_model.position_ids_too"),
    ]:
        change(folder, lambda t, name=name: t.update({name: np.zeros(3, np.float32)}))
        with pytest.raises(ValueError, match=message):
            read(folder)
        change(folder, lambda t, name=name: t.pop(name))
    read(folder)


def test_buffers_of_old_files_are_left_out(tmp_path):
    """position_ids, int64, which transformers saved until 4.31."""
    folder = copy("siglip2_b", tmp_path)
    for tower in ("text", "vision"):
        name = f"{tower}_model.embeddings.position_ids"
        change(folder, lambda t, name=name: t.update({name: np.arange(9)[None]}))
    navit.save(navit.load(folder), tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(GOLDEN / "siglip2_b"))


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "index.json lacks weight_map"),
        (
            {"weight_map": []},
            r"index.json: weight_map is \[\], but should be an object",
        ),
        ({"weight_map": {}}, "index.json: weight_map is empty"),
        ({"weight_map": {"a": 3}}, "index.json: a is 3, but should be a file's name"),
        ({"weight_map": {"a": "../x"}}, r"index.json names '\.\./x', which is not in"),
        ({"weight_map": {"a": "gone"}}, r"index.json names 'gone', which is not in"),
    ],
)
def test_an_invalid_index_is_an_error(index, message, tmp_path):
    folder = copy("siglip2_b", tmp_path)
    shutil.copyfile(folder / "model.safetensors", tmp_path / "x")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read(folder)


HEADS = "num_attention_heads"


@pytest.mark.parametrize(
    "part, message",
    [
        (None, "config.json: vision_config is None, but should be an object"),
        ([], r"config.json: vision_config is \[\], but should be an object"),
        *(
            ({HEADS: value}, f"config.json: {HEADS} is {value!r}, but should be a num")
            for value in (None, "3", 3.0, 0, True)
        ),
        ({HEADS: 3, "layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not supported"),
        ({HEADS: 3, "vision_use_head": False}, "vision_use_head=False is not supp"),
        ({HEADS: 3, "num_channels": 1}, "num_channels=1 is not supported"),
    ],
)
def test_a_config_json_of_other_types_or_settings_is_an_error(part, message, tmp_path):
    folder = copy("siglip2_b", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | dict(vision_config=part)))
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_assumed_heads_are_logged(tmp_path, caplog):
    """transformers omits its default, 12."""
    caplog.set_level("INFO", "navit")
    folder = copy("siglip2_a", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["vision_config"][HEADS]
    file.write_text(json.dumps(config))
    with contextlib.suppress(ValueError):  # 12 may not divide the width
        assert read(folder).model.vision.num_heads == 12
    assert f"config.json does not state vision_config.{HEADS}: assuming 12" in (
        caplog.text
    )


def test_an_image_processor_of_another_type_is_an_error(tmp_path):
    folder = copy("siglip2_b", tmp_path)
    (folder / "processor_config.json").write_text('{"image_processor": null}')
    with pytest.raises(
        ValueError, match=r"processor_config.json: image_processor is N"
    ):
        read(folder)


def test_an_npz_is_known_by_content_and_a_damaged_one_by_name(tmp_path):
    write(read(GOLDEN / "siglip2_b"), tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "checkpoint.zip")
    assert read(tmp_path / "checkpoint.zip").model.vision.width == 30
    (tmp_path / "a.npz").write_text("nothing")
    with pytest.raises(ValueError, match=r"a.npz is damaged or not an .npz file"):
        read(tmp_path / "a.npz")


def test_a_file_where_a_directory_stands_is_refused_before_the_work(tmp_path):
    def unread(name):
        raise AssertionError("a tensor was read")

    weights = dataclasses.replace(read(GOLDEN / "siglip2_b"), get=unread)
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a.npz is a directory, and a file"):
        write(weights, tmp_path / "a.npz")
    assert [x.name for x in tmp_path.rglob("*")] == ["a.npz"]


def test_all_files_of_a_directory_have_the_same_mode(tmp_path):
    write(read(GOLDEN / "siglip2_b"), tmp_path / "a")
    assert len({x.stat().st_mode for x in (tmp_path / "a").iterdir()}) == 1


def test_truncated_files_are_clear_errors(tmp_path, capsys):
    folder = copy("siglip2_b", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
    npz = tmp_path / "a.npz"
    navit.save(navit.load(GOLDEN / "siglip2_b"), npz, "big_vision")
    npz.write_bytes(npz.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a.npz is damaged or not an .npz file"):
        navit.load(npz)


def test_pickled_objects_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    file = tmp_path / "a.npz"
    np.savez(file, **{"params/t": np.array([Bomb()], object)})
    (tmp_path / "exploded").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"params/t is a pickled object"):
        navit.load(file)
    assert not (tmp_path / "exploded").exists()


def test_a_wrong_big_vision_tensor_is_named(tmp_path):
    file = tmp_path / "a.npz"
    navit.save(navit.load(GOLDEN / "siglip2_b"), file, "big_vision")
    with np.load(file) as found:
        arrays = dict(found)
    table = "params/img/pos_embedding"
    for value, message in [
        (arrays[table][1:], rf"{table} is \(6, 7, 30\), which is not square"),
        (arrays[table].astype(np.float64), rf"{table} is float64"),
        (None, f"lacks the tensor {table}"),
    ]:
        changed = {k: v for k, v in arrays.items() if k != table}
        changed |= {} if value is None else {table: value}
        np.savez(file, **changed)
        with pytest.raises(ValueError, match=message):
            navit.load(file)


def test_wrong_big_vision_names_and_axes_are_named(tmp_path):
    file = tmp_path / "a.npz"
    write(read(GOLDEN / "siglip2_b"), file)
    with np.load(file) as found:
        arrays = dict(found)
    block = "params/img/Transformer/encoderblock"
    one = np.zeros((), np.float32)
    for name, message in [
        (
            "params/img/head/kernel",
            r"params/img/head/kernel is \(\), but should have 2",
        ),
        (f"{block}_x/LayerNorm_0/bias", f"not know, first {block}_x"),
        (f"{block}_99999999999/LayerNorm_0/bias", f"lacks the tensor {block}_3/"),
        (f"ema/{block}_7/LayerNorm_0/bias", "not know, first ema"),
    ]:
        np.savez(file, **arrays, **{name: one})
        with pytest.raises(ValueError, match=message):
            read(file)


def test_config_json_that_contradicts_the_tensors_is_an_error(tmp_path):
    folder = copy("siglip2_b", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["hidden_size"] = 40
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vision_config.hidden_size=40, .* it 30"):
        navit.load(folder)
    config["vision_config"] = {"hidden_act": "relu"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"hidden_act='relu' is not supported"):
        navit.load(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_exactly(dtype, tmp_path):
    """Half precision and several files with an index."""
    folder = copy("siglip2_b", tmp_path)
    tensors = {k: v.astype(dtype) for k, v in tensors_of(folder).items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    navit.save(navit.load(folder), tmp_path / "back")
    want = {k: v.astype(np.float32) for k, v in tensors.items()}
    assert_same(tensors_of(tmp_path / "back"), want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_npz_are_read_exactly(dtype, tmp_path):
    """numpy has no bfloat16: its files say V2, two bytes of anything."""
    file = tmp_path / "a.npz"
    write(read(GOLDEN / "siglip2_b"), file)
    with np.load(file) as found:
        np.savez(file, **{name: found[name].astype(dtype) for name in found})
    with np.load(file) as found:
        assert found["params/t"].dtype == ("V2" if dtype != np.float16 else dtype)
    want, got = read(GOLDEN / "siglip2_b"), read(file)
    for name in shapes_of(want.model):
        exact = want.read(name).astype(dtype).astype(np.float32)
        assert got.read(name).dtype == np.float32
        np.testing.assert_array_equal(got.read(name), exact)


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 50_000)
    navit.save(navit.load(GOLDEN / "siglip2_a"), tmp_path / "a")
    files = sorted(x.name for x in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same(tensors_of(tmp_path / "a"), tensors_of(GOLDEN / "siglip2_a"))
    model = navit.load(tmp_path / "a")
    vision = navit.load(GOLDEN / "siglip2_a").config.model.vision
    assert model.config.model.vision == vision


def test_a_model_that_the_format_cannot_hold_is_refused(tmp_path):
    model = navit.load(GOLDEN / "siglip2_b")
    vision = dataclasses.replace(model.config.model.vision, pool="mean")
    changed = dataclasses.replace(model.config.model, vision=vision)
    model.config = dataclasses.replace(model.config, model=changed)
    with pytest.raises(ValueError, match=r"not support model.vision.pool='mean'"):
        navit.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"pool='mean'"):
        navit.save(model, tmp_path / "a.npz", "big_vision")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x").touch()
    with pytest.raises(FileExistsError, match="b already exists"):
        navit.save(model, tmp_path / "b")


@pytest.mark.parametrize(
    "setting, value, formats",
    [
        ("qk_norm", True, ("huggingface", "big_vision")),
        ("use_bias", False, ("huggingface", "big_vision")),
        ("gated", True, ("huggingface", "big_vision")),
        ("registers", 4, ("huggingface", "big_vision")),
        ("num_classes", 5, ("huggingface", "big_vision")),
        ("mean", (0.25, 0.5, 0.5), ("huggingface", "big_vision")),
        ("std", (0.25, 0.5, 0.5), ("huggingface", "big_vision")),
        ("pool_norm", True, ("huggingface", "big_vision")),
        ("embed_dim", 8, ("huggingface",)),
    ],
)
def test_settings_that_a_format_lacks_are_named(setting, value, formats, tmp_path):
    weights = read(GOLDEN / "siglip2_b")
    vision = dataclasses.replace(weights.model.vision, **{setting: value})
    model = dataclasses.replace(weights.model, vision=vision)
    for format in formats:
        said = rf"{setting}={re.escape(str(value))}.*--format navit"
        with pytest.raises(ValueError, match=said):
            write(dataclasses.replace(weights, model=model), tmp_path / "a", format)
    assert not list(tmp_path.iterdir())


def test_bfloat16_stays_close_to_float32(naflex):
    """The cosine distance is at most 1e-3; measured, 8e-5."""
    _, encode, want, images = naflex
    half = navit.load(
        GOLDEN / ("siglip2_a" if len(want["ids"][0]) == 12 else "siglip2_b"),
        overrides=["model.dtype=bfloat16"],
    )
    packed = pack(images, "packed")
    runs = encode, jax.jit(lambda packed: half.vision(packed))
    a, b = (np.asarray(run(packed).pooled) for run in runs)
    a, b = (x[packed.grids[..., 0] > 0].astype(np.float64) for x in (a, b))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert 0 < (1 - cosine).max() < 1e-3


def test_save_takes_its_format_from_the_path_or_by_name(tmp_path):
    model = navit.load(GOLDEN / "siglip2_b")
    navit.save(model, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").is_file()
    tokenizer = (GOLDEN / "siglip2_b/tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer
    np.testing.assert_array_equal(
        navit.load(tmp_path / "a.npz").embed_texts(["a cat"]),
        model.embed_texts(["a cat"]),
    )
    known = "pixtral, timm, not 'hf'"
    with pytest.raises(ValueError, match=known):
        navit.save(model, tmp_path / "b", format="hf")
    with pytest.raises(ValueError, match=r"c.safetensors .*such as .*/c, .*\.npz"):
        navit.save(model, tmp_path / "c.safetensors")
    assert not list(tmp_path.glob("[bc]*"))


def test_token_ids_of_a_resaved_config_do_not_matter(tmp_path):
    """transformers' defaults, which a model saved again may state."""
    folder = copy("siglip2_b", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= dict(pad_token_id=1, bos_token_id=49406)
    file.write_text(json.dumps(config))
    assert navit.load(folder).config.model.text.vocab_size == 61


def test_images_that_are_not_a_whole_number_of_patches_are_cut(tmp_path, caplog):
    """Resized to image_size; the rest beyond the last whole patch is left out."""
    model = navit.load(GOLDEN / "siglip_cut")
    assert model.config.model.vision.image_size == 23
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3)).astype(np.uint8)
    small = Image.fromarray(image).resize((23, 23), Image.Resampling.BILINEAR)
    rest = np.asarray(small).copy()
    rest[20:], rest[:, 20:] = 0, 255
    want = model.embed_images([image])
    np.testing.assert_array_equal(model.embed_images([np.asarray(small)]), want)
    np.testing.assert_array_equal(model.embed_images([rest]), want)
    # An .npz cannot record the size.
    file = tmp_path / "a.npz"
    navit.save(model, file)
    assert "load" in caplog.text and "model.vision.image_size=23" in caplog.text
    assert np.abs(navit.load(file).embed_images([image]) - want).max() > 1e-3
    named = navit.load(file, overrides=["model.vision.image_size=23"])
    np.testing.assert_array_equal(named.embed_images([image]), want)


def test_an_image_size_that_contradicts_the_table_is_refused(tmp_path):
    folder = copy("siglip_cut", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["image_size"] = 25
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"image_size=25, .* make it 20"):
        navit.load(folder)
    with pytest.raises(ValueError, match=r"image_size=25 has 5 patches .* is 4"):
        navit.load(GOLDEN / "siglip_cut", overrides=["model.vision.image_size=25"])
    with pytest.raises(ValueError, match=r"image_size=23 is for fixed_grid=true"):
        navit.load(GOLDEN / "siglip_cut", overrides=["model.vision.fixed_grid=false"])


@pytest.mark.parametrize(
    "name, said",
    [
        ("siglip2_b", dict(image_mean=[0.48, 0.46, 0.41])),
        ("siglip2_b", dict(image_std=[0.5, 0.5, 0.25])),
        ("siglip2_b", dict(rescale_factor=1 / 127.5)),
        ("siglip2_b", dict(do_resize=False)),
        ("siglip2_b", dict(do_rescale=False)),
        ("siglip2_b", dict(do_normalize=False)),
        ("siglip2_b", dict(patch_size=16)),
        ("siglip_cut", dict(size=dict(height=20, width=20))),
    ],
)
def test_preprocessing_that_differs_from_the_models_is_refused(name, said, tmp_path):
    folder = tmp_path / "a"
    write(read(GOLDEN / name), folder)
    read(folder)
    file = folder / "preprocessor_config.json"
    right = json.loads(file.read_text())
    ((key, value),) = said.items()
    message = re.escape(f"{file} has {key}={value!r}, ")
    for changed in (right | said, dict(image_processor=right | said)):
        file.write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=rf"{message}.* {re.escape(repr(right[key]))}"
        ):
            read(folder)
    right[key] = None  # left to the class, whose defaults are the model's
    file.write_text(json.dumps(right))
    read(folder)


def test_another_resize_is_logged_once(tmp_path, caplog):
    folder = copy("siglip_fixed", tmp_path)
    file = folder / "preprocessor_config.json"
    for resample, count in ((2, 0), (3, 1)):
        caplog.clear()
        file.write_text(json.dumps(dict(resample=resample)))
        read(folder)
        said = [x for x in caplog.messages if "resizes bilinearly" in x]
        assert len(said) == count and all("resample=3" in x for x in said)


# File in a folder: (the file it copies, its name when written, its class)
NAMES = {
    "tokenizer.json": (
        "siglip2_b/tokenizer.json",
        "tokenizer.json",
        "Siglip2Tokenizer",
    ),
    "gemma.model": ("gemma/gemma.model", "tokenizer.model", "Siglip2Tokenizer"),
    "spiece.model": ("siglip_cut/spiece.model", "spiece.model", "SiglipTokenizer"),
    "sentencepiece.model": (
        "siglip_cut/spiece.model",
        "spiece.model",
        "SiglipTokenizer",
    ),
}


@pytest.mark.parametrize("release", NAMES)
def test_tokenizers_are_written_under_the_names_that_readers_expect(release, tmp_path):
    """In every format; tokenizer_config.json names its class to transformers."""
    source, written, kind = NAMES[release]
    folder = copy("siglip2_b", tmp_path)
    (folder / "tokenizer.json").unlink()
    shutil.copyfile(GOLDEN / source, folder / release)
    texts = ["a photo, of a CAT", ""]
    ids = encode(texts, 9, str(folder / release))
    write(read(folder), tmp_path / "npz/a.npz")
    for found in (folder, tmp_path / "npz/a.npz"):
        out = tmp_path / f"from {found.stem}"
        write(read(found), out)
        assert read(out).model.text.tokenizer == str(out / written)
        np.testing.assert_array_equal(encode(texts, 9, str(out / written)), ids)
        about = json.loads((out / "tokenizer_config.json").read_text())
        assert about["tokenizer_class"] == kind and about["model_max_length"] == 9
    (folder / "tokenizer_config.json").write_text('{"its": "own"}')
    write(read(folder), tmp_path / "own")
    assert (tmp_path / "own/tokenizer_config.json").read_text() == '{"its": "own"}'


def test_the_pieces_are_preferred_to_tokenizer_json(tmp_path):
    """As transformers prefers them; the repositories of SigLIP 1 have both."""
    write(read(GOLDEN / "siglip_fixed"), tmp_path / "a")
    for name in ("spiece.model", "tokenizer.json"):
        golden = GOLDEN / "siglip_fixed" / name
        assert (tmp_path / "a" / name).read_bytes() == golden.read_bytes()
    assert Path(read(tmp_path / "a").model.text.tokenizer).name == "spiece.model"
    about = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "SiglipTokenizer"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["new", "a.npz", "empty", "workdir"])
def test_a_write_that_fails_leaves_nothing(name, error, tmp_path):
    """However much was written; an empty directory stays, and stays empty."""
    weights = read(GOLDEN / "siglip2_b")
    (tmp_path / "empty").mkdir()
    done = []

    def fail(ours):
        done.append(ours)
        if len(done) > 20:
            raise error
        return weights.read(ours)

    broken = dataclasses.replace(weights, get=fail)
    format = "navit" if name == "workdir" else None
    with pytest.raises(type(error)):
        write(broken, tmp_path / name, format)
    assert len(done) == 21
    assert [x.name for x in tmp_path.rglob("*")] == ["empty"]
    write(weights, tmp_path / name, format)
    found = {x.name for x in tmp_path.iterdir()} - {"empty", "tokenizer.json"}
    assert found <= {name} and not list(tmp_path.rglob(".*"))
    read(tmp_path / name)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A compressed npz, its bytes, and its tensors by our names."""
    file = tmp_path_factory.mktemp("compressed") / "a.npz"
    write(read(GOLDEN / "siglip2_b"), file)
    with np.load(file) as found:
        np.savez_compressed(file, **found)
    weights = read(file)
    return (
        file,
        file.read_bytes(),
        {x: weights.read(x) for x in shapes_of(weights.model)},
    )


@pytest.mark.parametrize("seed", range(40))
def test_damage_in_an_npz_is_detected_or_harmless(compressed, seed, tmp_path):
    """Ten changed bytes give a ValueError with the file, or the same tensors."""
    _, data, want = compressed
    rng = np.random.default_rng(seed)
    # Half of them where the headers are, at the end.
    start = len(data) - 12_000 if seed % 2 else 0
    changed = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(start, len(data), 10)
    changed[where] = rng.integers(0, 256, 10)
    file = tmp_path / "b.npz"
    file.write_bytes(changed.tobytes())
    try:
        weights = read(file)
        found = {x: weights.read(x) for x in shapes_of(weights.model)}
    except ValueError as error:
        assert "b.npz" in str(error)
        return
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "offset, value, message",
    [(6, 1, "encrypted"), (8, 99, "compression"), (30 + 40, 255, "")],
)
def test_npz_members_that_cannot_be_decompressed_are_clear_errors(
    compressed, offset, value, message, tmp_path
):
    """zipfile's RuntimeError, NotImplementedError and zlib.error."""
    _, data, _ = compressed
    changed = bytearray(data)
    central = data.index(b"PK\x01\x02")
    changed[offset] = value
    if message:  # stated in the directory too, two bytes further on
        changed[central + offset + 2] = value
    else:
        changed[offset : offset + 30] = bytes([255]) * 30
    file = tmp_path / "b.npz"
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"b.npz is damaged .*{message}"):
        read(file)
