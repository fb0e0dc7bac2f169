"""Rotary positions: the formula, and what towers with them can and cannot see."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_vision, pack_grids, random_patches, tiny_config

from navit.config import OptimConfig, PositionConfig, RotaryConfig, load, override
from navit.input import pipeline
from navit.model import rotary
from navit.sharding import Rules
from navit.train.optim import make_optimizer
from navit.train.state import init_state
from navit.train.step import make_train_step

GOLDEN = Path(__file__).parents[1] / "golden/rotary.npz"
slow = pytest.mark.slow
KINDS = ("qwen", "moonvit", "pixtral", "eva", "axial", "mixed", "dinov3")
K = 16  # channels of a head: 8 pairs


def restated(kind, j):
    """(axis, angle a step) of pair j."""
    first, i = j < K // 4, j % (K // 4)
    theta = {"axial": 100, "dinov3": 100}.get(kind, 10_000)
    frequency = theta ** (-4 * i / K)
    if kind == "pixtral" and not first:
        frequency = theta ** (-(4 * i + 2) / K)
    if kind == "dinov3":
        frequency *= 2 * math.pi
    return int(first if kind == "axial" else not first), frequency


def restated_position(kind, coord, side):
    if kind == "dinov3":
        return 2 * (coord + 0.5) / side - 1
    return coord / side * 16 if kind == "eva" else coord


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixed"])
def test_angles_as_published(kind):
    grid = (5, 9)
    coords = jnp.asarray(np.indices(grid).reshape(1, 2, -1).swapaxes(1, 2))
    own = jnp.broadcast_to(jnp.asarray(grid), coords.shape)
    found = np.asarray(rotary.angles(RotaryConfig(kind), coords, own, K))[0]
    coords = np.asarray(coords)
    assert found.dtype == np.float32
    for token, place in enumerate(coords[0]):
        for j in range(K // 2):
            axis, frequency = restated(kind, j)
            position = restated_position(kind, place[axis], grid[axis])
            expected = position * frequency
            assert found[token, j] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["qwen_80", "qwen_72", "pixtral_64", "pixtral_88"])
def test_angles_equal_transformers_to_the_bit(name):
    """At the released head widths, up to 511 patches from the corner.

    Of equal angles, two libraries' cosines and sines may round differently: by one unit
    in the last place.
    """
    kind, _, width = name.partition("_")
    with np.load(GOLDEN) as found:
        want = {part: found[f"{name}_{part}"] for part in ("angles", "cos", "sin")}
        coords = jnp.asarray(found["positions"])[None]
    config, grid = RotaryConfig(kind), jnp.full_like(coords, 512)
    angles = rotary.angles(config, coords, grid, int(width))
    np.testing.assert_array_equal(angles[0], want["angles"])
    turn = rotary.rotation(config, coords, grid, int(width))
    np.testing.assert_array_max_ulp(np.asarray(turn.cos[0]), want["cos"], maxulp=1)
    np.testing.assert_array_max_ulp(np.asarray(turn.sin[0]), want["sin"], maxulp=1)


def test_padding_and_registers_do_not_turn():
    zero, one = jnp.zeros((1, 3, 2), jnp.int32), jnp.ones((1, 3, 2), jnp.int32)
    for kind in KINDS:
        turn = rotary.rotation(RotaryConfig(kind), zero, one, K, unturned=2)
        np.testing.assert_array_equal(turn.positions, np.zeros((1, 5, 2)))
        if turn.cos is not None:
            assert (turn.cos == 1).all() and (turn.sin == 0).all()


def test_half_pairs_equal_adjacent_pairs_after_a_permutation(rng):
    """Of the rows of the query's and the key's weights, in each head."""
    heads, n = 3, 10
    angle = rng.normal(size=(n, K // 2)).astype(np.float32)
    q, k, v = rng.normal(size=(3, n, heads, K)).astype(np.float32)

    def adjacent(x):
        pairs = x.reshape(n, heads, K // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle[:, None])
        return np.stack([turned.real, turned.imag], -1).reshape(n, heads, K)

    expected = np.einsum("nhk,mhk->hnm", adjacent(q), adjacent(k))
    order = np.r_[0:K:2, 1:K:2]
    joined = [x.reshape(n, -1) for x in (q[..., order], k[..., order], v)]
    qkv = jnp.asarray(np.concatenate(joined, -1))[None]
    turned = rotary.rotate(qkv, jnp.asarray(angle)[None], K)
    a, b, c = (x.reshape(n, heads, K) for x in jnp.split(turned[0], 3, -1))
    np.testing.assert_allclose(jnp.einsum("nhk,mhk->hnm", a, b), expected, atol=1e-4)
    np.testing.assert_array_equal(c, v)


def test_rotation_is_computed_in_float32(rng):
    """At far positions too, where bfloat16 angles would be off by whole turns."""
    qkv = jnp.asarray(rng.normal(size=(1, 4, 3 * K)), jnp.bfloat16)
    coords = jnp.asarray([[[0, 0], [500, 3], [3, 511], [1000, 1000]]])
    angle = rotary.angles(RotaryConfig(), coords, jnp.full_like(coords, 1024), K)
    found = rotary.rotate(qkv, angle, K)
    assert found.dtype == jnp.bfloat16
    exact = rotary.rotate(qkv.astype(jnp.float32), angle, K)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_mixed_starts_as_two_axes_at_right_angles():
    found = rotary.learned_frequencies(jax.random.key(0), 3, K, 10.0)
    assert found.shape == (3, 2, K // 2)
    size = np.linalg.norm(found, axis=1)
    expected = 10.0 ** (-4 * np.arange(K // 4) / K)
    np.testing.assert_allclose(size, np.tile(expected, (3, 2)), rtol=1e-5)
    first, second = np.split(np.asarray(found), 2, -1)
    np.testing.assert_allclose((first * second).sum(1), 0, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-2  # each head has its own


@pytest.mark.parametrize("kind", ["qwen", "pixtral", "axial", "mixed"])
def test_a_bare_rotary_tower_sees_only_differences_of_positions(kind, rng):
    none = PositionConfig(kind="none")
    vision = make_vision(rotary=RotaryConfig(kind), position=none, pool="mean")
    run = jax.jit(vision)
    grids = [(3, 5), (4, 2)]
    rows = [{0: (0, grids[0]), 2: (1, grids[1])}]
    packed = pack_grids(rows, 24, 3, random_patches(rng, grids))
    before = run(packed).tokens
    shift = np.int32([17, 40]) * (packed.segment_ids == 1)[..., None]
    after = run(packed._replace(coords=packed.coords + shift)).tokens
    np.testing.assert_allclose(after, before, atol=1e-5)
    wider = packed._replace(coords=packed.coords * np.int32([1, 2]))
    assert np.abs(run(wider).tokens - before).max() > 1e-3


def test_coordinates_and_theta_can_be_chosen():
    coords, grid = jnp.asarray([[[2, 3]]]), jnp.asarray([[[4, 12]]])

    def find(**options):
        return rotary.positions(RotaryConfig(**options), coords, grid)[0, 0].tolist()

    assert find() == [2, 3] and find(kind="eva") == [8, 4]
    assert find(coordinates="reference", reference=24) == [12, 6]
    assert find(coordinates="centred") == pytest.approx([0.25, -5 / 12])
    slow, usual = (
        rotary.frequencies(RotaryConfig(theta=theta), K) for theta in (100.0, None)
    )
    assert slow[0, 1] == pytest.approx(100**-0.25) and usual[0, 1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="other angles in every block"):
        rotary.angles(RotaryConfig("mixed"), coords, grid, K)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["num_heads=8", "rotary.kind=qwen"], "divisible by 4, not 2"),
        (["rotary.reference=24"], "is for coordinates='reference'"),
        (["rotary.theta=-1"], "theta must be positive"),
        (["rotary.kind=qwem"], "did you mean 'qwen'"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        override(tiny_config(), [f"model.vision.{x}" for x in overrides])


def test_rotary_from_the_command_line():
    config = override(tiny_config(), ["model.vision.rotary.kind=axial"])
    assert config.model.vision.rotary == RotaryConfig("axial")
    assert override(config, ["model.vision.rotary=none"]) == tiny_config()


@pytest.fixture(scope="module")
def batch():
    """Two rows of the quickstart's images."""
    config = quickstart()
    source = pipeline.open_source(config.data.train)
    return next(iter(pipeline.train_batches(config, source)))


def quickstart(*options):
    """The quickstart's model, loss and optimizer, on fewer images and tokens."""
    path = Path(__file__).parents[2] / "configs/quickstart.py"
    fewer = ["data.rows=2", "data.row_tokens=160", "data.train.size=40", "mesh.data=1"]
    return override(load(path), [*fewer, *options])


# The two whose programs differ most; each takes seconds to compile.
FIRST = ("moonvit", "mixed")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in FIRST else pytest.param(kind, marks=slow) for kind in KINDS],
)
def test_a_training_step_of_the_quickstart_with_each_kind(kind, batch):
    """Every parameter of the tower gets a gradient, and the loss falls."""
    table = ["model.vision.position.kind=none"]
    if kind == "moonvit":
        table = ["model.vision.position.resize=bicubic"]
    config = quickstart(
        f"model.vision.rotary.kind={kind}",
        *table,
        "optim.warmup_steps=0",
        "optim.lr=1e-4",
    )
    optimizer = make_optimizer(config.optim, 10)
    state = init_state(config, optimizer, Rules())
    before = jax.tree.map(np.asarray, state.model.vision)
    step = make_train_step(config, optimizer, Rules())
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, state.model.vision)
    for path, some in jax.tree_util.tree_leaves_with_path(moved):
        assert some, jax.tree_util.keystr(path)
    learned = before.encoder.blocks.attention.frequencies
    assert (learned is None) == (kind != "mixed")


def test_only_kernels_decay():
    """Without gradients, learned frequencies and the like stay to the bit."""
    model = make_vision(
        rotary=RotaryConfig("mixed"), registers=2, layer_scale=0.1, gated=True
    )
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5, warmup_steps=0), 10)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(model), model)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        assert bool(update.any()) == ("kernel" in name), name
    assert not updates.encoder.blocks.attention.frequencies[...].any()
