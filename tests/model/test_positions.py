import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import POSITIONS

from navit.config import PositionConfig
from navit.model.positions import PositionEmbedding, axis_weights

GRIDS = [
    (1, 40),
    (3, 85),
    (256, 1),
    (65, 2),
    (16, 16),
    (23, 7),
    (9, 31),
    (40, 2),
    (1, 1),
    (27, 27),
    (32, 32),
    (1, 256),
    (85, 3),
    (2, 65),
    (15, 17),
    (7, 100),
    (100, 7),
    (64, 16),
    (8, 8),
    (5, 5),
    (13, 70),
    (1, 2),
]


def tokens(*grids, length=None):
    """coords and grid of each token, image after image, in a row of `length` tokens."""
    coords = np.concatenate([np.indices(grid).reshape(2, -1).T for grid in grids])
    own = np.repeat(grids, np.prod(grids, axis=1), axis=0)
    pad = ((0, 0 if length is None else length - len(coords)), (0, 0))
    own = np.pad(own, pad, constant_values=1)
    return jnp.asarray(np.pad(coords, pad)[None]), jnp.asarray(own[None])


def make(config, width):
    """A position embedding and its compiled call."""
    position = PositionEmbedding(config, width, rngs=nnx.Rngs(0))
    return position, jax.jit(position.__call__)


@pytest.mark.parametrize("side", [5, 7, 16])
def test_table_resize_equals_jax_image(side):
    position, embed = make(PositionConfig(size=side), 8)

    @jax.jit
    def resized(grid):
        """The table resized to `grid`, in the first cells of a larger array."""
        return jax.image.scale_and_translate(
            position.table[...],
            (256, 256, 8),
            (0, 1),
            grid / side,
            jnp.zeros(2),
            "linear",
            antialias=True,
        )

    for grid in [*GRIDS, (2, 4)]:
        expected = resized(jnp.array(grid, jnp.float32))[: grid[0], : grid[1]]
        count = grid[0] * grid[1]
        found = embed(*tokens(grid, length=1024))[0, :count].reshape(*grid, 8)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(grid))


def test_axis_weights_sum_to_one_for_any_extent():
    weigh = jax.jit(functools.partial(axis_weights, size=16))
    cells = np.arange(4000)
    for extent in (1, 2, 15, 16, 17, 500, 4000):
        weights = weigh(np.minimum(cells, extent - 1), np.full(4000, extent))
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
        assert (weights >= 0).all()


@pytest.fixture(scope="module")
def embed_all():
    """(coords, grid) -> the vectors of every kind, in one program."""

    def embed(coords, grid):
        kinds = (PositionEmbedding(x, 24, rngs=nnx.Rngs(0)) for x in POSITIONS)
        return [position(coords, grid) for position in kinds]

    return jax.jit(embed)


def test_token_depends_only_on_its_own_coords_and_grid(embed_all):
    """In any place of any row, beside any other image, for every kind."""
    coords, grid = tokens((3, 7), (5, 2), length=42)
    order = np.random.default_rng(0).permutation(42)
    before, shuffled = (
        embed_all(coords[:, x], grid[:, x]) for x in (np.arange(42), order)
    )
    beside_another = embed_all(*tokens((1, 9), (3, 7), length=42))
    for config, a, b, c in zip(
        POSITIONS, before, shuffled, beside_another, strict=True
    ):
        np.testing.assert_array_equal(a[:, order], b, err_msg=str(config))
        np.testing.assert_array_equal(a[:, :21], c[:, 9:30], err_msg=str(config))
        assert a.dtype == jnp.float32, config
        assert np.isfinite(a).all(), config


def test_different_places_differ(embed_all):
    for config, found in zip(
        POSITIONS, embed_all(*tokens((3, 7), length=42)), strict=True
    ):
        found = np.asarray(found)[0, :21]
        distance = np.abs(found[:, None] - found[None]).max(-1)
        assert (distance + np.eye(21) > 1e-4).all(), config


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "fourier"])
def test_fractional_coordinates_do_not_see_the_size(encoding):
    """The middle of an image is the same place in a 3x3 and in a 9x9 grid."""
    _, embed = make(PositionConfig(kind="factorized", encoding=encoding), 24)
    small, large = np.split(np.asarray(embed(*tokens((3, 3), (9, 9)))[0]), [9])
    small, large = small.reshape(3, 3, -1), large.reshape(9, 9, -1)
    np.testing.assert_allclose(small[1, 1], large[4, 4], atol=1e-6)
    np.testing.assert_allclose(small[0, 2], large[1, 7], atol=1e-6)


def test_aspect_preserving_coordinates_tell_the_shape():
    """A 2x8 image: plain fractions fill both axes; these fill a quarter of one."""
    # The last place of a 2x8 grid, and the same place of a square.
    coords, grid = jnp.array([[[1, 7], [1, 7]]]), jnp.array([[[2, 8], [8, 8]]])

    def both(coordinates):
        config = PositionConfig(kind="factorized", coordinates=coordinates)
        return make(config, 24)[1](coords, grid)[0]

    # Row 1 of 2 lies at 0.75 of its own side, but at 1.5/8 of the longer side, like
    # row 1 of a square 8x8.
    wide, square = both("fractional_aspect")
    np.testing.assert_allclose(wide, square, atol=1e-6)
    wide, square = both("fractional")
    assert np.abs(wide - square).max() > 0


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d"])
def test_learned_tables_are_read_exactly(kind):
    position, embed = make(PositionConfig(kind=kind, size=64), 8)
    coords, grid = tokens((5, 6))
    table = np.asarray(position.table[...])
    rows, columns = np.asarray(coords)[0].T
    expected = (
        table[rows * 6 + columns] if kind == "learned_1d" else table[rows, columns]
    )
    np.testing.assert_array_equal(embed(coords, grid)[0], expected)


def test_factorized_absolute_combinations():
    """Sum, product and stacking of the same two tables."""
    for combine in ("sum", "product", "stack"):
        config = PositionConfig(
            kind="factorized", coordinates="absolute", size=16, combine=combine
        )
        position, embed = make(config, 8)
        row = np.asarray(position.row.table[...])[2]
        column = np.asarray(position.column.table[...])[5]
        expected = {
            "sum": row + column,
            "product": row * column,
            "stack": np.concatenate([row, column]),
        }[combine]
        found = embed(jnp.array([[[2, 5]]]), jnp.array([[[9, 9]]]))[0, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_limit_on_the_side():
    """big_vision's released code gives NaN beyond 64 patches a side."""
    _, embed = make(PositionConfig(), 8)
    assert np.isfinite(embed(*tokens((2, 5000)))).all()


def test_width_that_cannot_be_split_is_an_error():
    config = PositionConfig(kind="factorized", encoding="fourier", combine="stack")
    with pytest.raises(ValueError, match="width 6 cannot be split"):
        PositionEmbedding(config, 6, rngs=nnx.Rngs(0))
