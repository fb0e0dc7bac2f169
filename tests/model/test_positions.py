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


def tokens(grid, pad=0):
    """coords and grid of every token of one image, as a row padded at the end."""
    coords = np.indices(grid).reshape(2, -1).T
    coords = np.concatenate([coords, np.zeros((pad, 2), int)])[None]
    return jnp.asarray(coords), jnp.broadcast_to(jnp.array(grid), coords.shape)


@pytest.mark.parametrize(
    "grid, side", [(grid, 16) for grid in GRIDS] + [((3, 85), 5), ((2, 4), 7)]
)
def test_table_resize_equals_jax_image(grid, side):
    position = PositionEmbedding(PositionConfig(size=side), 8, rngs=nnx.Rngs(0))
    table = position.table[...]
    scale = jnp.array([grid[0] / side, grid[1] / side])
    expected = jax.image.scale_and_translate(
        table, (*grid, 8), (0, 1), scale, jnp.zeros(2), "linear", antialias=True
    )
    found = position(*tokens(grid))[0].reshape(*grid, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_axis_weights_sum_to_one_for_any_extent():
    for extent in (1, 2, 15, 16, 17, 500, 4000):
        weights = axis_weights(jnp.arange(extent), jnp.full(extent, extent), 16)
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
        assert (weights >= 0).all()


@pytest.mark.parametrize("config", POSITIONS, ids=str)
def test_token_depends_only_on_its_own_coords_and_grid(config):
    position = PositionEmbedding(config, 24, rngs=nnx.Rngs(0))
    coords, grid = tokens((3, 7), pad=11)
    order = np.random.default_rng(0).permutation(coords.shape[1])
    found = position(coords, grid)
    np.testing.assert_array_equal(found[:, order], position(coords[:, order], grid))
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("config", POSITIONS, ids=str)
def test_different_places_differ(config):
    position = PositionEmbedding(config, 24, rngs=nnx.Rngs(0))
    found = np.asarray(position(*tokens((3, 7))))[0]
    distance = np.abs(found[:, None] - found[None]).max(-1)
    assert (distance + np.eye(21) > 1e-4).all()


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "fourier"])
def test_fractional_coordinates_do_not_see_the_size(encoding):
    """The middle of an image is the same place in a 3x3 and in a 9x9 grid."""
    config = PositionConfig(kind="factorized", encoding=encoding)
    position = PositionEmbedding(config, 24, rngs=nnx.Rngs(0))
    small = position(*tokens((3, 3)))[0].reshape(3, 3, -1)
    large = position(*tokens((9, 9)))[0].reshape(9, 9, -1)
    np.testing.assert_allclose(small[1, 1], large[4, 4], atol=1e-6)
    np.testing.assert_allclose(small[0, 2], large[1, 7], atol=1e-6)


def test_aspect_preserving_coordinates_tell_the_shape():
    """A 2x8 image: plain fractions fill both axes; these fill a quarter of one."""
    last = jnp.array([[[1, 7]]])
    grid = jnp.array([[[2, 8]]])
    square = jnp.array([[[7, 7]]]), jnp.array([[[8, 8]]])

    def make(coordinates):
        config = PositionConfig(kind="factorized", coordinates=coordinates)
        return PositionEmbedding(config, 24, rngs=nnx.Rngs(0))

    plain, aspect = make("fractional"), make("fractional_aspect")
    # Row 1 of 2 lies at 0.75 of its own side, but at 1.5/8 of the longer side, like
    # row 1 of a square 8x8.
    same = aspect(jnp.array([[[1, 7]]]), square[1])
    np.testing.assert_allclose(aspect(last, grid), same, atol=1e-6)
    assert np.abs(plain(last, grid) - plain(jnp.array([[[1, 7]]]), square[1])).max() > 0


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d"])
def test_learned_tables_are_read_exactly(kind):
    config = PositionConfig(kind=kind, size=64)
    position = PositionEmbedding(config, 8, rngs=nnx.Rngs(0))
    coords, grid = tokens((5, 6))
    table = np.asarray(position.table[...])
    rows, columns = np.asarray(coords)[0].T
    expected = (
        table[rows * 6 + columns] if kind == "learned_1d" else table[rows, columns]
    )
    np.testing.assert_array_equal(position(coords, grid)[0], expected)


def test_factorized_absolute_combinations():
    """Sum, product and stacking of the same two tables."""
    for combine in ("sum", "product", "stack"):
        config = PositionConfig(
            kind="factorized", coordinates="absolute", size=16, combine=combine
        )
        position = PositionEmbedding(config, 8, rngs=nnx.Rngs(0))
        row = np.asarray(position.row.table[...])[2]
        column = np.asarray(position.column.table[...])[5]
        expected = {
            "sum": row + column,
            "product": row * column,
            "stack": np.concatenate([row, column]),
        }[combine]
        found = position(jnp.array([[[2, 5]]]), jnp.array([[[9, 9]]]))[0, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_limit_on_the_side():
    """big_vision's released code gives NaN beyond 64 patches a side."""
    position = PositionEmbedding(PositionConfig(), 8, rngs=nnx.Rngs(0))
    assert np.isfinite(position(*tokens((2, 5000)))).all()


def test_width_that_cannot_be_split_is_an_error():
    config = PositionConfig(kind="factorized", encoding="fourier", combine="stack")
    with pytest.raises(ValueError, match="width 6 cannot be split"):
        PositionEmbedding(config, 6, rngs=nnx.Rngs(0))
