"""Settings of a release's JSON files: each is used, or refused by file and key."""

import dataclasses
import json

import pytest

from navit import strategies
from navit.config import PositionConfig
from navit.weights import read, write
from tests.convert.test_convert import GOLDEN
from tests.convert.test_tower_files import copy

CONFIG, PIXELS = "config.json", "preprocessor_config.json"
PARTS = {
    "ovis2_5": "vit_config",
    "timm_gap": "model_args",
    "timm_parfac": "model_args",
    "timm_siglip": "model_args",
}


def state(folder, file, settings):
    """Changes a JSON file; those of config.json are the tower's, or `/` the whole's."""
    path = folder / file
    data = json.loads(path.read_text()) if path.exists() else {}
    part = PARTS.get(folder.name, "vision_config")
    for key, value in settings.items():
        inner = data[part] if file == CONFIG and not key.startswith("/") else data
        inner[key.removeprefix("/")] = value
    path.write_text(json.dumps(data))


# Tower, file, key, value, what is said of it.
REFUSED = [
    ("qwen2_5_vl", CONFIG, "fullatt_block_indexes", ["1"], "a list of whole numbers"),
    ("qwen2_5_vl", CONFIG, "fullatt_block_indexes", None, "a list of whole numbers"),
    ("qwen2_5_vl", CONFIG, "fullatt_block_indexes", [9], "the 3 blocks are 0 to 2"),
    ("qwen2_5_vl", CONFIG, "window_size", 7, "one merged token, which is 8 pixels"),
    ("qwen2_5_vl", CONFIG, "num_heads", "2", "a whole number of at least 1"),
    ("qwen2_5_vl", CONFIG, "num_heads", None, "a whole number of at least 1"),
    ("qwen2_5_vl", CONFIG, "num_heads", True, "a whole number of at least 1"),
    ("qwen2_5_vl", CONFIG, "num_heads", [2], "a whole number of at least 1"),
    ("qwen2_5_vl", CONFIG, "num_heads", 5, "not divisible by num_heads 5"),
    ("qwen2_5_vl", CONFIG, "hidden_size", 25, "the tensors make it 24"),
    ("qwen2_5_vl", CONFIG, "intermediate_size", 36, "the tensors make it 37"),
    ("qwen2_5_vl", CONFIG, "depth", 4, "the tensors make it 3"),
    ("qwen2_5_vl", CONFIG, "patch_size", 14, "the tensors make it 4"),
    ("qwen2_5_vl", CONFIG, "temporal_patch_size", 1, "the tensors make it 2"),
    ("qwen2_5_vl", CONFIG, "spatial_merge_size", 3, "the tensors make it 2"),
    ("qwen2_5_vl", CONFIG, "out_hidden_size", 3, "the tensors make it 20"),
    ("qwen2_5_vl", CONFIG, "in_chans", 4, "the tensors make it 3"),
    ("qwen2_5_vl", CONFIG, "hidden_act", "relu", "navit knows 'quick_gelu', 'silu'"),
    ("qwen2_5_vl", CONFIG, "rope_theta", "1e4", "a number above 0"),
    ("qwen2_5_vl", CONFIG, "/vision_config", None, "an object"),
    ("qwen2_vl", CONFIG, "mlp_ratio", 4, "the tensors make it 64/32"),
    ("qwen3_vl", CONFIG, "num_position_embeddings", 35, "the tensors make it 36"),
    ("qwen2_vl", PIXELS, "do_normalize", False, "navit knows True"),
    ("qwen2_vl", PIXELS, "do_rescale", False, "navit knows True"),
    ("qwen2_vl", PIXELS, "do_resize", 1, "navit knows True"),
    ("qwen2_vl", PIXELS, "rescale_factor", 1.0, "navit knows 0.00392"),
    ("qwen2_vl", PIXELS, "resample", 0, "navit knows 2, 3"),
    ("kimi_vl", PIXELS, "resample", 2, "navit knows 3"),
    ("pixtral", PIXELS, "resample", 2, "navit knows 3"),
    ("qwen2_vl", PIXELS, "image_mean", [1, 2, 3], "three numbers from 0 to 1"),
    ("qwen2_vl", PIXELS, "image_mean", 0.5, "three numbers from 0 to 1"),
    ("qwen2_vl", PIXELS, "image_std", [0, 1, 1], "three numbers above 0"),
    ("qwen2_vl", PIXELS, "min_pixels", "x", "a whole number of at least 1"),
    ("qwen2_vl", PIXELS, "min_pixels", 9999, "more than max_pixels=1600"),
    ("qwen2_vl", PIXELS, "size", 3, "an object"),
    ("qwen2_vl", PIXELS, "patch_size", 14, "the tensors make it 4"),
    ("qwen2_vl", PIXELS, "merge_size", 1, "the tensors make it 2"),
    ("qwen2_vl", PIXELS, "temporal_patch_size", 1, "the tensors make it 2"),
    ("qwen2_vl", PIXELS, "image_processor", 1, "an object"),
    ("kimi_vl", CONFIG, "init_pos_emb_height", 8, "the tensors make it 7"),
    ("kimi_vl", CONFIG, "merge_kernel_size", [3, 3], "MoonViT's is [2, 2]"),
    ("kimi_vl", CONFIG, "num_attention_heads", 2.0, "a whole number of at least 1"),
    ("kimi_vl", PIXELS, "in_token_limit", "x", "a whole number of at least 1"),
    ("kimi_vl", PIXELS, "pad_input", False, "navit knows True"),
    ("kimi_vl", PIXELS, "media_proc_cfg", [1], "an object"),
    ("pixtral", CONFIG, "head_dim", 8, "the tensors make it 12"),
    ("pixtral", CONFIG, "image_size", [64], "a whole number of at least 1"),
    ("pixtral", CONFIG, "hidden_act", "relu", "navit knows 'silu', 'gelu'"),
    ("pixtral", CONFIG, "rope_parameters", 3, "an object"),
    ("pixtral", CONFIG, "rope_parameters", {"rope_theta": -1}, "a number above 0"),
    ("pixtral", CONFIG, "/spatial_merge_size", 0, "a whole number of at least 1"),
    ("pixtral", CONFIG, "/vision_feature_layer", -2, "navit knows -1"),
    ("pixtral", PIXELS, "patch_size", {"height": 4, "width": 5}, "tensors make it 4"),
    ("pixtral", PIXELS, "size", {"longest_edge": "x"}, "a whole number of at least 1"),
    ("ovis2_5", CONFIG, "use_rope", False, "navit knows True"),
    ("ovis2_5", CONFIG, "layer_norm_eps", "x", "a number above 0"),
    ("ovis2_5", CONFIG, "hidden_stride", None, "a whole number of at least 1"),
    ("ovis2_5", CONFIG, "fullatt_block_indexes", "0|a", "a list of whole numbers"),
    ("ovis2_5", CONFIG, "image_size", 24, "the tensors make it 20"),
    ("ovis2_5", PIXELS, "max_pixels", 0, "a whole number of at least 1"),
    ("ovis2_5", PIXELS, "resample", 0, "navit knows 2, 3"),
    ("timm_gap", CONFIG, "/architecture", None, "a text"),
    ("timm_gap", CONFIG, "/model_args", [], "an object"),
    ("timm_gap", CONFIG, "/pretrained_cfg", {"mean": "x"}, "three numbers from 0"),
    ("timm_gap", CONFIG, "/pretrained_cfg", {"tag": 3}, "a text"),
    ("timm_gap", CONFIG, "/pretrained_cfg", {"interpolation": "box"}, "'bilinear', "),
    ("timm_gap", CONFIG, "num_heads", 1.5, "a whole number of at least 1"),
    ("timm_gap", CONFIG, "depth", 3, "the tensors make it 2"),
    ("timm_gap", CONFIG, "reg_tokens", 5, "the tensors make it 4"),
    ("timm_gap", CONFIG, "global_pool", 3, "navit knows 'map', 'avg', 'max'"),
    ("timm_gap", CONFIG, "init_values", "x", "a number above 0"),
    ("timm_gap", CONFIG, "patchify_channels_last", False, "navit knows True"),
    ("timm_gap", CONFIG, "norm_layer", "rmsnorm", "is not supported"),
    ("timm_gap", CONFIG, "pos_embed_interp_mode", 3, "a text"),
    ("timm_gap", CONFIG, "pos_embed_antialias", None, "'bicubic', None, False"),
    ("timm_siglip", CONFIG, "attn_pool_num_heads", 1, "navit knows 2"),
    ("timm_parfac", CONFIG, "pos_embed_grid_size", [5, 6], "the tensors make it 5"),
]


@pytest.mark.parametrize("name", sorted({name for name, *_ in REFUSED}))
def test_what_is_not_supported_is_named_by_file_and_key(name, tmp_path):
    for i, (tower, file, key, value, said) in enumerate(REFUSED):
        if tower != name:
            continue
        folder = copy(name, tmp_path / str(i))
        state(folder, file, {key: value})
        with pytest.raises(ValueError) as error:
            read(folder)
        message, last = str(error.value), key.removeprefix("/")
        assert message.startswith(f"{folder / file}: ") and "\n" not in message, key
        assert message.count(str(folder)) == 1, message
        assert said in message, message
        if isinstance(value, dict):
            last = next((x for x in value if x in message), last)
        named = last in message or last in ("fullatt_block_indexes", "num_heads")
        assert named, message


def test_settings_are_used(tmp_path):
    """And written again."""

    def opened(name, *changes):
        folder = copy(name, tmp_path / str(len([*tmp_path.iterdir()])))
        for file, settings in changes:
            state(folder, file, settings)
        weights, back = read(folder), folder / "back"
        if name != "qwen3_vl":
            write(weights, back)
            again = read(back)
            assert (again.model, again.strategy) == (weights.model, weights.strategy)
        return weights.model.vision, weights.strategy

    v, rule = opened("pixtral", (CONFIG, {"rope_theta": 100.0, "head_dim": 12}))
    assert v.rotary.theta == 100 and rule == strategies.Pixtral(4, 64)
    rope = {"rope_type": "axial", "rope_theta": 50.0}
    v, rule = opened(
        "pixtral",
        (CONFIG, {"rope_parameters": rope, "/spatial_merge_size": 2}),
        (PIXELS, {"size": {"longest_edge": 40}, "patch_size": 4}),
    )
    assert v.rotary.theta == 50 and rule == strategies.Pixtral(4, 40, merge=2)
    v, rule = opened("pixtral", (CONFIG, {"rope_theta": 10000.0}))
    assert v.rotary.theta is None

    v, rule = opened("ovis2_5")
    released = dict(min_pixels=448**2, max_pixels=1344 * 1792, temporal_patch=1)
    assert v.eps == 1e-6
    assert rule == strategies.QwenVL(4, **released, resample="bilinear")
    v, rule = opened(
        "ovis2_5",
        (CONFIG, {"layer_norm_eps": 1e-5, "fullatt_block_indexes": "1"}),
        (PIXELS, {"min_pixels": 64, "max_pixels": 640, "resample": 3}),
    )
    assert v.eps == 1e-5 and (v.window, v.full_blocks) == (28, (1,))
    assert (rule.min_pixels, rule.max_pixels, rule.resample) == (64, 640, "bicubic")

    _, rule = opened("qwen2_5_vl", (CONFIG, {"rope_theta": 9.0}))
    assert rule == strategies.QwenVL(4, min_pixels=256, max_pixels=1600)
    v, rule = opened("timm_gap", (CONFIG, {"global_pool": "max"}))
    assert v.pool == "max" and rule.max_tokens == 576


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("qwen2_vl", 56**2, 28**2 * 1280), ("qwen3_vl", 256**2, 4096**2)],
)
def test_without_a_processor_the_bounds_are_the_releases(name, low, high, tmp_path):
    folder = copy(name, tmp_path)
    (folder / PIXELS).unlink()
    rule = read(folder).strategy
    assert (rule.min_pixels, rule.max_pixels) == (low, high)


def test_a_size_of_pixtral_without_its_longest_edge_is_refused(tmp_path):
    folder = copy("pixtral", tmp_path)
    state(folder, PIXELS, {"size": {"height": 32, "width": 64}})
    with pytest.raises(ValueError, match=rf"{PIXELS} lacks longest_edge"):
        read(folder)


def test_nulls_of_a_processor_are_not_stated(tmp_path):
    folder = copy("qwen2_vl", tmp_path)
    nulls = dict.fromkeys(("size", "do_center_crop", "resample", "do_normalize"))
    state(folder, PIXELS, nulls)
    want = read(GOLDEN / "qwen2_vl")
    assert dataclasses.astuple(read(folder).model) == dataclasses.astuple(want.model)


def test_a_frame_without_a_table_is_refused():
    with pytest.raises(ValueError, match="frame=square has no effect on kind=factor"):
        PositionConfig("factorized", frame="square")
