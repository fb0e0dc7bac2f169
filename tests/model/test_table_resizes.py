"""Each way to resize a position table, per token, against whole resized tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_vision

from navit.config import PositionConfig
from navit.model.positions import PositionEmbedding

SIDE, WIDTH = 7, 4
GRIDS = [(1, 1), (1, 20), (3, 5), (7, 7), (7, 13), (20, 2), (14, 21), (6, 8)]
RESIZES = ("linear-antialias", "bicubic", "bicubic-antialias", "linear-align-corners")


@functools.cache
def embedding(resize, frame="own"):
    config = PositionConfig(size=SIDE, resize=resize, frame=frame)
    position = PositionEmbedding(config, WIDTH, rngs=nnx.Rngs(0))
    return np.asarray(position.table[...]), jax.jit(position.__call__)


def embed(resize, grid, frame="own"):
    """The vectors of all places of a grid, `[rows, columns, d]`."""
    count = grid[0] * grid[1]
    coords = np.zeros((1, 400, 2), np.int32)
    coords[0, :count] = np.indices(grid).reshape(2, -1).T
    own = np.ones((1, 400, 2), np.int32)
    own[0, :count] = grid
    found = embedding(resize, frame)[1](coords, own)
    return np.asarray(found)[0, :count].reshape(*grid, WIDTH)


def cubic(x, a):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def axis(resize, extent):
    """The `[extent, SIDE]` matrix that resizes one axis, by its definition."""
    matrix, scale = np.zeros((extent, SIDE)), SIDE / extent
    for i in range(extent):
        centre = (i + 0.5) * scale - 0.5
        if resize == "linear-align-corners":
            place = np.linspace(0, SIDE - 1, extent)[i]
            low = int(np.floor(place))
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, SIDE - 1)] += place - low
        elif resize == "bicubic":
            first = int(np.floor(centre)) - 1
            for cell in range(first, first + 4):
                matrix[i, np.clip(cell, 0, SIDE - 1)] += cubic(centre - cell, -0.75)
        else:
            reach = max(scale, 1.0)
            for cell in range(SIDE):
                x = (centre - cell) / reach
                linear = max(0.0, 1 - abs(x))
                matrix[i, cell] = cubic(x, -0.5) if "cubic" in resize else linear
            matrix[i] /= matrix[i].sum()
    return matrix


@pytest.mark.parametrize("resize", RESIZES)
def test_a_table_is_resized_as_defined(resize):
    table = embedding(resize)[0].astype(np.float64)
    for rows, columns in GRIDS:
        expected = np.einsum(
            "iy,jx,yxd->ijd", axis(resize, rows), axis(resize, columns), table
        )
        found = embed(resize, (rows, columns))
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=(rows, columns))


@pytest.mark.parametrize(
    "resize, method", [(RESIZES[0], "linear"), (RESIZES[2], "cubic")]
)
def test_antialiased_resizes_equal_jax_image(resize, method):
    table = embedding(resize)[0]
    for grid in ((3, 5), (14, 2)):
        expected = jax.image.resize(table, (*grid, WIDTH), method, antialias=True)
        np.testing.assert_allclose(embed(resize, grid), expected, atol=1e-5)


@pytest.mark.parametrize("resize", RESIZES)
def test_a_grid_of_the_table_leaves_it_untouched(resize):
    table = embedding(resize)[0]
    for frame in ("own", "square"):
        np.testing.assert_array_equal(embed(resize, (SIDE, SIDE), frame), table)


@pytest.mark.parametrize("resize", RESIZES)
def test_the_square_frame_is_cut_at_the_top_left(resize):
    for rows, columns in ((3, 5), (20, 2)):
        side = max(rows, columns)
        whole = embed(resize, (side, side)) if side**2 <= 400 else None
        assert whole is not None
        found = embed(resize, (rows, columns), "square")
        np.testing.assert_array_equal(found, whole[:rows, :columns])
    assert np.abs(embed(resize, (3, 5), "square") - embed(resize, (3, 5))).max() > 1e-3


def test_no_table_has_no_parameters():
    vision = make_vision(position=PositionConfig(kind="none"))
    assert vision.position is None
    assert not any("position" in str(p) for p, _ in jax.tree.leaves_with_path(vision))
    assert jnp.isfinite(vision.patch.kernel[...]).all()
