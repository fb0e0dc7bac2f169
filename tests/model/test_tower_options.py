"""The settings of other released towers: what each computes, and that packing holds."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_vision, pack_grids, random_patches, vision_config

from navit.config import (
    Config,
    ModelConfig,
    PositionConfig,
    RotaryConfig,
    VisionConfig,
    from_json,
    to_json,
)
from navit.model import encoder, flops, rotary
from navit.model.attention import attention_qkvpacked
from navit.model.block import Block, BlockOptions
from navit.model.flops import Counts
from navit.model.vision import Vision
from navit.sharding import Rules

NONE = PositionConfig(kind="none")
TOWERS = {
    "moonvit": dict(
        rotary=RotaryConfig("moonvit"),
        position=PositionConfig(size=5, resize="bicubic"),
        eps=1e-5,
        pool="none",
    ),
    "qwen25": dict(
        rotary=RotaryConfig("qwen"),
        position=NONE,
        norm="rms",
        act="silu",
        gated=True,
        patch_bias=False,
        final_norm=False,
        window=3,
        full_blocks=(1,),
    ),
    "pixtral": dict(
        rotary=RotaryConfig("pixtral"),
        position=NONE,
        norm="rms",
        eps=1e-5,
        act="silu",
        gated=True,
        use_bias=False,
        pre_norm=True,
        final_norm=False,
    ),
    "naflexvit": dict(act="exact", layer_scale=0.3, registers=3),
    "mixed": dict(rotary=RotaryConfig("mixed"), registers=2, pool="map"),
    "dinov3": dict(rotary=RotaryConfig("dinov3"), position=NONE, act="quick"),
}
GRIDS = [(3, 4), (1, 9), (5, 2), (4, 4)]


@functools.cache
def proofs(name, implementation):
    """packed -> its output, and how slot 1's tokens depend on all patches."""
    options = {"pool": "mean", **TOWERS[name]}
    vision = make_vision(
        ModelConfig(
            vision=vision_config(**options), text=None, attention=implementation
        )
    )

    def total(patches, packed):
        out = vision(packed._replace(patches=patches), max_image_tokens=16)
        own = (packed.segment_ids == 2)[..., None]
        pooled = 0 if out.pooled is None else (out.pooled[:, 1] ** 2).sum()
        return (out.tokens**2 * own).sum() + pooled, out

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def encode(packed):
        (_, out), gradient = run(jnp.asarray(packed.patches), packed)
        return out, np.asarray(gradient)

    return encode


def normalized(packed):
    return packed._replace(patches=packed.patches.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize(
    "implementation",
    ["unpack", "blocks", pytest.param("xla", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", TOWERS)
def test_no_leak_in_towers(name, implementation, rng):
    encode, patches = proofs(name, implementation), random_patches(rng, GRIDS)
    rows = {0: (0, GRIDS[0]), 1: (1, GRIDS[1]), 3: (2, GRIDS[2])}
    packed = normalized(pack_grids([rows], 40, 4, patches))
    before, gradient = encode(packed)
    own = packed.segment_ids[0] == 2

    # A neighbour that changes or goes leaves every bit of the others.
    changed = packed._replace(patches=packed.patches.copy())
    changed.patches[0, :12] *= -1
    removed = packed._replace(
        patches=packed.patches * (packed.segment_ids != 1)[..., None],
        segment_ids=packed.segment_ids * (packed.segment_ids != 1),
        grids=packed.grids * np.int32([[[0], [1], [1], [1]]]),
    )
    for other in (changed, removed):
        after = encode(other)[0]
        np.testing.assert_array_equal(before.tokens[0, 12:], after.tokens[0, 12:])
        assert np.abs(before.tokens[0, :12] - after.tokens[0, :12]).max() > 1e-3
        if before.pooled is not None:
            np.testing.assert_array_equal(before.pooled[0, 1:], after.pooled[0, 1:])
    assert (gradient[0, ~own] == 0).all() and np.abs(gradient[0, own]).max() > 0

    # Alone, at another place of the row, and in another slot.
    alone = encode(normalized(pack_grids([{1: (1, GRIDS[1])}], 40, 4, patches)))[0]
    np.testing.assert_allclose(alone.tokens[0, :9], before.tokens[0, own], atol=1e-5)
    moved = {0: (3, GRIDS[3]), 2: (1, GRIDS[1])}
    moved = encode(normalized(pack_grids([moved], 40, 4, patches)))[0]
    np.testing.assert_allclose(moved.tokens[0, 16:25], before.tokens[0, own], atol=1e-5)
    if before.pooled is not None:
        for other, slot in ((alone, 1), (moved, 2)):
            np.testing.assert_allclose(
                other.pooled[0, slot], before.pooled[0, 1], atol=1e-5
            )
        assert (before.pooled[0, 2] == 0).all()
    assert (before.tokens[0, 31:] == 0).all()


def restated_block(block, x, o, width, angle):
    """A block on one image, in float64 numpy."""

    def norm(x, layer):
        if o.norm == "rms":
            return (
                x / np.sqrt((x**2).mean(-1, keepdims=True) + o.eps) * value(layer.scale)
            )
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + o.eps)
        return y * value(layer.scale) + value(layer.bias)

    def value(param):
        return 0.0 if param is None else np.asarray(param[...], np.float64)

    def dense(x, layer):
        return x @ value(layer.kernel) + value(layer.bias)

    def heads(x):
        return x.reshape(len(x), -1, width).swapaxes(0, 1)

    def turn(x):
        a, b = np.split(x, 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    act = {
        "exact": lambda x: x * 0.5 * (1 + np.vectorize(_erf)(x / np.sqrt(2))),
        "quick": lambda x: x / (1 + np.exp(-1.702 * x)),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }[o.act]
    y = norm(x, block.attention_norm)
    q, k, v = (
        heads(dense(y, getattr(block.attention, name)))
        for name in ("query", "key", "value")
    )
    logits = turn(q) @ turn(k).swapaxes(1, 2) * width**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = dense((weights @ v).swapaxes(0, 1).reshape(x.shape), block.attention.out)
    scale = o.layer_scale is not None
    x = x + out * (value(block.attention_scale) if scale else 1)
    y = norm(x, block.mlp_norm)
    up = dense(y, block.mlp.up)
    hidden = act(dense(y, block.mlp.gate)) * up if o.gated else act(up)
    return x + dense(hidden, block.mlp.down) * (value(block.mlp_scale) if scale else 1)


def _erf(x):
    return float(jax.scipy.special.erf(np.float32(x)))


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="rms", act="silu", gated=True, eps=1e-2),
        dict(norm="rms", act="silu", gated=True, use_bias=False),
        dict(act="quick", eps=1e-2),
        dict(act="exact", layer_scale=0.3),
    ],
    ids=lambda options: options["act"] + str(len(options)),
)
def test_a_block_computes_what_its_settings_say(options, rng):
    o = BlockOptions(16, 24, 2, **options)
    shapes = jax.eval_shape(
        lambda key: Block(
            o, dtype=jnp.float32, rules=Rules(), rngs=nnx.Rngs(key), fused=True
        ),
        jax.random.key(0),
    )
    block = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.4, jnp.float32), shapes
    )
    x = rng.normal(size=(1, 7, 16)).astype(np.float32)
    angle = rng.normal(size=(1, 7, 4)).astype(np.float32)
    turn = rotary.Rotation(jnp.zeros((1, 7, 2)), jnp.cos(angle), jnp.sin(angle))
    attend = functools.partial(attention_qkvpacked, segment_ids=None)
    found = jax.jit(lambda block, x: block(x, attend, turn))(block, jnp.asarray(x))
    expected = restated_block(block, x[0].astype(np.float64), o, 8, angle[0])
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


def test_defaults_have_the_parameters_they_had():
    names = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(make_vision())
    }
    for new in ("gate", "registers", "frequencies", "pre_norm", "_scale"):
        assert not any(new in name for name in names), new


def test_registers_are_tokens_of_their_image_alone(rng):
    """As if each image had them first, in a row of its own, without positions."""
    vision = make_vision(registers=3, pool="mean", rotary=RotaryConfig("qwen"))
    patches = random_patches(rng, [(3, 4)])
    packed = pack_grids([{1: (0, (3, 4))}], 16, 2, patches)
    out = jax.jit(vision)(packed)

    coords = jnp.asarray(packed.coords[:, :12])
    own = jnp.broadcast_to(jnp.asarray((3, 4)), coords.shape)
    x = vision.patch(jnp.asarray(packed.patches[:, :12].astype(np.float32) / 127.5 - 1))
    x = x + vision.position(coords, own)
    x = jnp.concatenate([vision.registers[...][None], x], 1)
    angle = rotary.angles(vision.config.rotary, coords, own, 8)
    angle = jnp.pad(angle, ((0, 0), (3, 0), (0, 0)))
    turn = rotary.Rotation(jnp.zeros((1, 15, 2)), jnp.cos(angle), jnp.sin(angle))
    attend = functools.partial(attention_qkvpacked, segment_ids=None)
    expected = vision.encoder(x, attend, rotation=turn)[0, 3:]
    np.testing.assert_allclose(out.tokens[0, :12], expected, atol=1e-5)
    np.testing.assert_allclose(out.pooled[0, 1], expected.mean(0), atol=1e-5)
    assert out.tokens.shape == (1, 16, 24) and (out.pooled[0, 0] == 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=8), "go together"),
        (dict(full_blocks=(1,)), "go together"),
        (dict(window=8, full_blocks=(2,)), "has 2, but the 2 blocks are 0 to 1"),
        (dict(window=8, full_blocks=(1,), registers=4), "belong to no window"),
        (dict(registers=-1), "registers is -1"),
        (dict(layer_scale=0.0), "layer_scale must be positive"),
    ],
)
def test_settings_that_contradict_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        vision_config(**options)


def test_configs_are_saved_whole():
    for options in TOWERS.values():
        options = {**options, "pool": "mean"}
        config = Config(model=ModelConfig(vision=vision_config(**options)))
        assert from_json(to_json(config)) == config


def test_kernels_that_do_not_cover_a_setting_say_so(monkeypatch, caplog):
    monkeypatch.setattr(encoder, "platform", lambda: "tpu")
    encoder._warn_unfused.cache_clear()
    packed = pack_grids([{0: (0, (1, 1))}], 4, 1, [np.zeros((1, 48), np.uint8)])
    with caplog.at_level(logging.WARNING):
        for options in (dict(), dict(act="exact", gated=True)):
            vision = Vision(vision_config(pool="none", **options))
            jax.eval_shape(vision, packed)
    assert [x.getMessage().partition(":")[0] for x in caplog.records] == [
        "model.vision.act=exact, gated=True"
    ]


def test_flops_of_gates_registers_and_windows():
    sizes = dict(patch_size=2, width=8, depth=3, mlp_dim=10, num_heads=2, pool="none")
    grids = np.array([[3, 5], [2, 2]])
    squares = 15**2 + 4**2

    def count(**options):
        model = ModelConfig(vision=VisionConfig(**sizes, **options), text=None)
        inside = flops.window_squares(model, grids)
        return flops.forward(model, Counts(19, squares, 2, window_squares=inside))

    usual = count()
    assert count(gated=True).vision == usual.vision + 19 * 3 * 2 * 8 * 10
    assert count(norm="rms", layer_scale=1.0, rotary=RotaryConfig()) == usual
    registers = count(registers=4)
    block = 8 * 8**2 + 4 * 8 * 10
    assert registers.vision == usual.vision + 4 * 2 * 3 * block
    assert registers.attention == 3 * 4 * 8 * (19**2 + 8**2)
    # Windows of 2: 3x5 has 2x2 twice, 2x1, 1x2 twice and 1x1.
    windows = 16 * 2 + 4 + 4 * 2 + 1 + 16
    found = count(window=2, full_blocks=(1,)).attention
    assert found == 4 * 8 * (squares + 2 * windows)
