"""Position embeddings, computed per token from its coordinates and its image's grid.

No static shape depends on an image's shape, so images of any shapes share a row. Each
lookup is a product of per-axis weights with a table: one-hot weights read the table,
triangle weights resize it. Unlike a gather's, its gradient is a matrix product too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from navit.config import PositionConfig
from navit.model.mrope import mrope_ids as mrope_ids
from navit.model.mrope import v2pe_ids as v2pe_ids

_HIGHEST = jax.lax.Precision.HIGHEST  # a lookup must not round the table


def axis_weights(
    index: Int[Array, "*b"], extent: Int[Array, "*b"], size: int
) -> Float[Array, "*b {size}"]:
    """How much each of `size` table cells counts in cell `index` of `extent` cells.

    This is the linear kernel of `jax.image.scale_and_translate(..., antialias=True)`
    and of TensorFlow's and PyTorch's antialiased bilinear resize: half-pixel centres,
    widened when shrinking, renormalised at the border. Rows sum to 1.
    """
    scale = size / extent.astype(jnp.float32)
    center = (index.astype(jnp.float32) + 0.5) * scale - 0.5
    return _triangle(center, jnp.maximum(scale, 1.0), size)


def cubic_weights(
    index: Int[Array, "*b"], extent: Int[Array, "*b"], size: int
) -> Float[Array, "*b {size}"]:
    """`axis_weights` of PyTorch's `interpolate(mode="bicubic")`, without antialias.

    Four cells by the cubic kernel with a = -0.75, half-pixel centres; cells beyond the
    border are the border's.
    """
    scale = size / extent.astype(jnp.float32)
    center = (index.astype(jnp.float32) + 0.5) * scale - 0.5
    first = jnp.floor(center).astype(jnp.int32) - 1
    weights = jnp.zeros((*center.shape, size))
    for tap in range(4):
        cell = first + tap
        weight = _cubic(center - cell, -0.75)[..., None]
        weights += weight * jax.nn.one_hot(jnp.clip(cell, 0, size - 1), size)
    return weights


def antialiased_cubic_weights(
    index: Int[Array, "*b"], extent: Int[Array, "*b"], size: int
) -> Float[Array, "*b {size}"]:
    """`axis_weights` of an antialiased bicubic resize: the cubic kernel with a = -0.5.

    PyTorch's `interpolate(mode="bicubic", antialias=True)` and JAX's "cubic".
    """
    scale = size / extent.astype(jnp.float32)
    center = (index.astype(jnp.float32) + 0.5) * scale - 0.5
    distance = _distance(center, size) / jnp.maximum(scale, 1.0)[..., None]
    weights = _cubic(distance, -0.5)
    return weights / weights.sum(-1, keepdims=True)


def corner_weights(
    index: Int[Array, "*b"], extent: Int[Array, "*b"], size: int
) -> Float[Array, "*b {size}"]:
    """`axis_weights` of a linear resize that puts the corner cells at the corners.

    PyTorch's `interpolate(mode="bilinear", align_corners=True)`, without antialias.
    """
    scale = (size - 1) / jnp.maximum(extent - 1, 1).astype(jnp.float32)
    center = index.astype(jnp.float32) * scale
    return _triangle(center, jnp.ones_like(center), size)


_RESIZES = {
    "linear-antialias": axis_weights,
    "bicubic": cubic_weights,
    "bicubic-antialias": antialiased_cubic_weights,
    "linear-align-corners": corner_weights,
}


class PositionEmbedding(nnx.Module):
    """(coords, grid) of each token -> its position embedding, `[b, n, d]`."""

    def __init__(self, config: PositionConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.config, self.width = config, width
        size = config.size
        if config.kind == "factorized":
            halves = 2 if config.combine == "stack" else 1
            if width % (halves * (1 if config.encoding == "learned" else 2)):
                raise ValueError(f"width {width} cannot be split for {config}")
            # Makes the product of two embeddings as large as their sum would be.
            std = width**-0.25 if config.combine == "product" else width**-0.5
            make = _ENCODINGS[config.encoding]
            self.row = make(size, width // halves, std, axis=0, rngs=rngs)
            self.column = make(size, width // halves, std, axis=1, rngs=rngs)
        else:
            sides = (size,) if config.kind == "learned_1d" else (size, size)
            table = jax.random.normal(rngs.params(), (*sides, width))
            self.table = nnx.Param(table * width**-0.5)

    def __call__(
        self, coords: Int[Array, "b n 2"], grid: Int[Array, "b n 2"]
    ) -> Float[Array, "b n d"]:
        """Embeds in float32; `grid` is the (rows, columns) of each token's image."""
        kind, size = self.config.kind, self.config.size
        if kind == "factorized":
            return self._factorized(coords, grid)
        table = self.table[...].reshape(-1, self.width)
        if kind == "learned_1d":
            raster = coords[..., 0] * grid[..., 1] + coords[..., 1]
            return _lookup(jax.nn.one_hot(raster, size, dtype=jnp.float32), table)
        if kind == "learned_2d":
            row = jax.nn.one_hot(coords[..., 0], size, dtype=jnp.float32)
            column = jax.nn.one_hot(coords[..., 1], size, dtype=jnp.float32)
        else:  # "siglip2"
            if self.config.frame == "square":
                side = grid.max(-1, keepdims=True)
                grid = jnp.concatenate([side, side], -1)
            weights = _RESIZES[self.config.resize]
            row = weights(coords[..., 0], grid[..., 0], size)
            column = weights(coords[..., 1], grid[..., 1], size)
        both = row[..., :, None] * column[..., None, :]
        return _lookup(both.reshape(*both.shape[:-2], size * size), table)

    def _factorized(
        self, coords: Int[Array, "b n 2"], grid: Int[Array, "b n 2"]
    ) -> Float[Array, "b n d"]:
        kind, size = self.config.coordinates, self.config.size
        # In units of table cells, from 0 at the centre of the first cell.
        if kind == "absolute":
            position = coords.astype(jnp.float32)
        else:
            side = grid if kind == "fractional" else grid.max(-1, keepdims=True)
            position = (coords + 0.5) / side * size - 0.5
        row, column = self.row(position[..., 0]), self.column(position[..., 1])
        if self.config.combine == "sum":
            return row + column
        if self.config.combine == "product":
            return row * column
        return jnp.concatenate([row, column], -1)


class _Learned(nnx.Module):
    """A table of `size` entries, read with linear interpolation."""

    def __init__(
        self, size: int, width: int, std: float, *, axis: int, rngs: nnx.Rngs
    ) -> None:
        del axis
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (size, width)))

    def __call__(self, position: Float[Array, "b n"]) -> Float[Array, "b n d"]:
        table = self.table[...]
        weights = _triangle(position, jnp.ones_like(position), table.shape[0])
        return _lookup(weights, table)


class _Sinusoidal(nnx.Module):
    """Fixed sines and cosines with geometric wavelengths, up to 10,000 cells.

    The wavelengths of columns lie between those of rows. Otherwise, a sum or a product
    could not tell (row, column) from (column, row).
    """

    def __init__(
        self, size: int, width: int, std: float, *, axis: int, rngs: nnx.Rngs
    ) -> None:
        del size, rngs
        self.width, self.axis, self.scale = width, axis, std * math.sqrt(2)

    def __call__(self, position: Float[Array, "b n"]) -> Float[Array, "b n d"]:
        half = self.width // 2
        frequency = 10_000.0 ** (-(jnp.arange(half) + self.axis / 2) / half)
        angle = position[..., None] * frequency[None, None]
        return self.scale * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class _Fourier(nnx.Module):
    """The sine and cosine of a learned linear map of the position."""

    def __init__(
        self, size: int, width: int, std: float, *, axis: int, rngs: nnx.Rngs
    ) -> None:
        del axis
        half = width // 2
        # Along `size` cells, most features make less than one period, some up to three.
        self.frequency = nnx.Param(
            jax.random.normal(rngs.params(), (half,)) * 2 * math.pi / size
        )
        self.phase = nnx.Param(jnp.zeros((half,)))
        self.scale = std * math.sqrt(2)

    def __call__(self, position: Float[Array, "b n"]) -> Float[Array, "b n d"]:
        frequency, phase = self.frequency[...], self.phase[...]
        angle = position[..., None] * frequency[None, None] + phase[None, None]
        return self.scale * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


_ENCODINGS = {"learned": _Learned, "sinusoidal": _Sinusoidal, "fourier": _Fourier}


def _triangle(
    center: Float[Array, "*b"], reach: Float[Array, "*b"], size: int
) -> Float[Array, "*b {size}"]:
    distance = _distance(center, size) / reach[..., None]
    weights = jnp.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(-1, keepdims=True)


def _distance(center: Float[Array, "*b"], size: int) -> Float[Array, "*b {size}"]:
    """From each centre to each table cell, in cells."""
    cells = jnp.expand_dims(jnp.arange(size), range(center.ndim))
    return jnp.abs(center[..., None] - cells)


def _cubic(distance: Float[Array, "*b"], a: float) -> Float[Array, "*b"]:
    """The cubic convolution kernel (Keys 1981), which is 0 from 2 on."""
    x = jnp.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))


def _lookup(
    weights: Float[Array, "b n c"], table: Float[Array, "c d"]
) -> Float[Array, "b n d"]:
    return jnp.einsum("bnc,cd->bnd", weights, table, precision=_HIGHEST)
