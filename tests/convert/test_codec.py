"""The codec: every table stores each of our tensors once, and nothing is lost."""

from pathlib import Path

import numpy as np
import pytest

from navit.config import ModelConfig, PositionConfig, TextConfig, VisionConfig
from navit.convert import codec, tensors
from navit.convert.stored import Weights, shapes_of


def model(**vision):
    return ModelConfig(
        vision=VisionConfig(
            patch_size=4,
            width=24,
            depth=3,
            mlp_dim=40,
            num_heads=3,
            position=PositionConfig(size=5),
            **vision,
        ),
        text=TextConfig(length=9, width=18, depth=2, mlp_dim=37, num_heads=2),
    )


NAFLEX, FIXED, HEAD = model(), model(fixed_grid=True), model(embed_dim=13)
CASES = {
    "hf": (NAFLEX, tensors.huggingface(NAFLEX)),
    "hf fixed": (FIXED, tensors.huggingface(FIXED)),
    **{
        f"big_vision {name} {image} {text}": (
            config,
            tensors.big_vision(config, scanned_vision=image, scanned_text=text),
        )
        for name, config in (("naflex", NAFLEX), ("fixed", FIXED), ("head", HEAD))
        for image in (False, True)
        for text in (False, True)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_table_writes_it_reads_bit_for_bit(case):
    config, table = CASES[case]
    rng = np.random.default_rng(0)
    ours = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in shapes_of(config).items()
    }
    named = [name for tensor in table for name in tensor.ours]
    assert sorted(named) == sorted(ours)
    stored = dict(codec.encoded(table, Weights(config, ours.__getitem__, "here")))
    shapes = {name: value.shape for name, value in stored.items()}
    assert shapes == codec.stored_shapes(table, config)
    assert all(value.flags.c_contiguous for value in stored.values())
    codec.check(Path("here"), table, config, shapes)
    get = codec.reader(table, config, stored.__getitem__)
    for name, value in ours.items():
        back = get(name)
        assert back.shape == value.shape and back.tobytes() == value.tobytes(), name


def store(axes, name="vision.head.query.kernel"):
    """One of our tensors, as a table of one line stores it."""
    table = [codec.Tensor("x", (name,), axes)]
    shape = shapes_of(NAFLEX)[name]
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ((_, stored),) = codec.encoded(table, Weights(NAFLEX, lambda _: value, "here"))
    get = codec.reader(table, NAFLEX, {"x": stored}.__getitem__)
    np.testing.assert_array_equal(get(name), value)
    return value, stored


def test_axes_are_joined_split_and_moved():
    value, stored = store("i o -> o i")
    np.testing.assert_array_equal(stored, value.T)
    value, stored = store("d (h k) -> h 1 d k")
    np.testing.assert_array_equal(
        stored, value.reshape(24, 3, 8).transpose(1, 0, 2)[:, None]
    )
    axes = "(rows columns rgb) d -> d (rgb rows) columns"
    value, stored = store(axes, "vision.patch.kernel")
    want = value.reshape(4, 4, 3, 24).transpose(3, 2, 0, 1).reshape(24, 12, 4)
    np.testing.assert_array_equal(stored, want)


def test_axes_are_stored_in_reverse_and_each_part_by_its_own_rule():
    """As MoonViT stores the channels that rotary positions turn."""
    value, stored = store("d (h pair xy f) -> (h f ~xy pair) d")
    want = value.reshape(24, 3, 2, 2, 2).transpose(1, 4, 3, 2, 0)[:, :, ::-1]
    np.testing.assert_array_equal(stored, want.reshape(24, 24))
    names = tuple(f"vision.head.{x}.kernel" for x in ("key", "value"))
    table = [codec.Tensor("x", names, ("i o -> o i", None))]
    value = np.arange(24 * 24, dtype=np.float32).reshape(24, 24)
    ((_, stored),) = codec.encoded(table, Weights(NAFLEX, lambda _: value, "here"))
    np.testing.assert_array_equal(stored, np.concatenate([value.T, value]))
    get = codec.reader(table, NAFLEX, {"x": stored}.__getitem__)
    for name in names:
        np.testing.assert_array_equal(get(name), value)


def test_layers_stacked_in_one_tensor_keep_their_axis():
    name = "text.encoder.blocks.attention.query.kernel"
    value, stored = store("d (h k) -> (h d) k", name)
    want = value.reshape(2, 18, 2, 9).transpose(0, 2, 1, 3).reshape(2, 36, 9)
    np.testing.assert_array_equal(stored, want)


def test_several_of_ours_are_joined_layer_by_layer():
    """As formats do that store the query, key and value of a layer as one."""
    parts = ("query", "key", "value")
    names = tuple(f"text.encoder.blocks.attention.{x}.bias" for x in parts)
    table = [codec.Tensor("blocks.{}.qkv", names)]
    ours = {x: np.full((2, 18), i, np.float32) for i, x in enumerate(names)}
    ours[names[1]][1] = 7
    stored = dict(codec.encoded(table, Weights(NAFLEX, ours.__getitem__, "here")))
    assert list(stored) == ["blocks.0.qkv", "blocks.1.qkv"]
    np.testing.assert_array_equal(
        stored["blocks.0.qkv"].reshape(3, 18)[:, 0], [0, 1, 2]
    )
    np.testing.assert_array_equal(
        stored["blocks.1.qkv"].reshape(3, 18)[:, 0], [0, 7, 2]
    )
    get = codec.reader(table, NAFLEX, stored.__getitem__)
    for name, value in ours.items():
        np.testing.assert_array_equal(get(name), value)
