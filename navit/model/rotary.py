"""Rotary positions: queries and keys turn by angles that are linear in coordinates.

`angle[b, n, j] = sum over axes a of position[b, n, a] * F[a, j]`. Pair j of a head of
k channels is (j, j + k/2) ("rotate-half"), and it turns by its angle in queries and
keys, so that their product depends only on differences of positions (RoFormer, arXiv
2104.09864, section 3.2). Weights of towers with other pairs fit after a permutation of
each head's channels, which converters make.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from navit.config import RotaryConfig
from navit.kernels import turn as kernel
from navit.sharding import platform

_log = logging.getLogger(__name__)

# theta, coordinates and the side of the reference grid of each kind.
_PRESETS: dict[str, tuple[float, str, int]] = {
    "qwen": (10_000.0, "index", 16),  # transformers, models/qwen2_vl
    "moonvit": (10_000.0, "index", 16),  # arXiv 2504.07491
    "pixtral": (10_000.0, "index", 16),  # transformers, models/pixtral
    "eva": (10_000.0, "reference", 16),  # timm, layers/pos_embed_sincos.py
    "axial": (100.0, "index", 16),  # rope-vit, arXiv 2403.13298
    "mixed": (10.0, "index", 16),
    "dinov3": (100.0, "centred", 16),  # arXiv 2508.10104
}


class Rotation(NamedTuple):
    """How the tokens of a batch turn, in every block.

    Attributes:
      positions: (row, column) of each token; 0 at padding.
      cos, sin: of the angles of the pairs; None if each block learns its frequencies.
      tables: the same for the TPU kernel; None where it does not run.
    """

    positions: Float[Array, "b n 2"]
    cos: Float[Array, "b n m"] | None
    sin: Float[Array, "b n m"] | None
    tables: kernel.Tables | None = None

    def turn(
        self,
        qkv: Float[Array, "b n c"],
        width: int,
        learned: Float[Array, "h 2 m"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Turns queries and keys; see `rotate`.

        Args:
          learned: the frequencies of each head of this block.
        """
        if learned is not None:
            return rotate(qkv, _angles(self.positions, learned), width)
        if self.tables is not None:
            return _by_kernel(qkv, self.tables, width)
        assert self.cos is not None and self.sin is not None
        return _turned(qkv, self.cos, self.sin, width)


def rotation(
    config: RotaryConfig,
    coords: Int[Array, "b n 2"],
    grid: Int[Array, "b n 2"],
    head_width: int,
    *,
    unturned: int = 0,
    kernel_heads: int = 0,
) -> Rotation:
    """How tokens turn, with `unturned` tokens after them that do not.

    Args:
      coords, grid: as for `angles`.
      kernel_heads: heads on each device, if a TPU kernel may turn them; 0: it may not.
    """
    places = jnp.pad(positions(config, coords, grid), ((0, 0), (0, unturned), (0, 0)))
    if config.kind == "mixed":
        return Rotation(places, None, None)
    turns = _angles(places, jnp.asarray(frequencies(config, head_width)))
    cos, sin, tables = jnp.cos(turns), jnp.sin(turns), None
    if kernel_heads and platform() == "tpu":
        if kernel.takes(turns.shape[1], kernel_heads, head_width):
            tables = kernel.tables(cos, sin, kernel_heads)
        else:
            _warn_slow(turns.shape[1], kernel_heads, head_width)
    return Rotation(places, cos, sin, tables)


@functools.cache
def _warn_slow(row_tokens: int, heads: int, width: int) -> None:
    _log.warning(
        "model.vision.rotary: the TPU kernel does not take rows of %d tokens with %d "
        "heads of %d channels; turning them without it is several times slower",
        row_tokens,
        heads,
        width,
    )


def _by_kernel(
    qkv: Float[Array, "b n c"], tables: kernel.Tables, width: int
) -> Float[Array, "b n c"]:
    """The kernel on each device's rows and heads."""
    rows, _, heads = (*jax.typeof(qkv).sharding.spec, None, None, None)[:3]
    if rows is None and heads is None:
        return kernel.turn(qkv, tables, width)
    whole = jax.P(rows, None, heads)
    # check_vma=False: a kernel does not declare the axes over which its results vary.
    mapped: Any = jax.shard_map(
        lambda x, y: kernel.turn(x, y, width),
        in_specs=(whole, jax.P(rows)),
        out_specs=whole,
        check_vma=False,
    )
    return mapped(qkv, tables)


def angles(
    config: RotaryConfig,
    coords: Int[Array, "b n 2"],
    grid: Int[Array, "b n 2"],
    head_width: int,
) -> Float[Array, "b n m"]:
    """The angle of each of `head_width / 2` pairs of channels, in radians and float32.

    Padding, at (0, 0) in a grid of 1x1, has the angle 0 for every kind.

    Args:
      grid: the (rows, columns) of each token's image.

    Raises:
      ValueError: for "mixed", whose frequencies belong to the blocks.
    """
    if config.kind == "mixed":
        raise ValueError('kind="mixed" has other angles in every block and head')
    places = positions(config, coords, grid)
    return _angles(places, jnp.asarray(frequencies(config, head_width)))


def positions(
    config: RotaryConfig, coords: Int[Array, "b n 2"], grid: Int[Array, "b n 2"]
) -> Float[Array, "b n 2"]:
    """The position of each token in the kind's coordinates."""
    _, coordinates, reference = _settings(config)
    places = coords.astype(jnp.float32)
    if coordinates == "centred":
        return 2 * (places + 0.5) / grid - 1
    if coordinates == "reference":
        return places / grid * reference
    return places


def frequencies(config: RotaryConfig, head_width: int) -> Float[np.ndarray, "2 m"]:
    """F: the angle of each pair for one step along the rows, and along the columns."""
    if head_width % 4:
        raise ValueError(f"a head width of {head_width} is not divisible by 4")
    quarter = head_width // 4
    theta = _settings(config)[0]
    steps = np.arange(quarter)
    first = _inverse_powers(theta, 4 * steps, head_width)
    second, zero = first, np.zeros(quarter, np.float32)
    if config.kind == "pixtral":
        second = _inverse_powers(theta, 4 * steps + 2, head_width)
    if config.kind == "dinov3":
        first = second = np.float32(2 * math.pi) * first
    of_first = np.concatenate([first, zero])
    of_second = np.concatenate([zero, second])
    if config.kind == "axial":  # columns come first
        of_first, of_second = of_second, of_first
    return np.stack([of_first, of_second]).astype(np.float32)


def _inverse_powers(
    theta: float, steps: Int[np.ndarray, " q"], head_width: int
) -> Float[np.ndarray, " q"]:
    """`theta^(-steps / head_width)`, rounded where PyTorch rounds: equal to the bit."""
    exponents = steps.astype(np.float32) / np.float32(head_width)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    return np.float32(1) / powers.astype(np.float32)


def learned_frequencies(
    key: Array, heads: int, head_width: int, theta: float, *, out_sharding: Any = None
) -> Float[Array, "h 2 m"]:
    """The first frequencies of "mixed": two axes at right angles, at random in a head.

    rope-vit's `init_2d_freqs`, with its pairs in rotate-half's order.
    """
    magnitude = theta ** (-4 * jnp.arange(head_width // 4) / head_width)
    # Drawn as the parameter will be split, since each device draws its own heads.
    uniform = jax.random.uniform(key, (heads, 1, 1), out_sharding=out_sharding)
    phi = 2 * math.pi * uniform

    def axis(turned: float) -> Array:  # cos(phi - pi/2) is sin(phi)
        pair = [jnp.cos(phi - turned), jnp.cos(phi + math.pi / 2 - turned)]
        return jnp.concatenate([magnitude[None, None] * part for part in pair], -1)

    return jnp.concatenate([axis(math.pi / 2), axis(0.0)], 1)


def learned_theta(config: RotaryConfig | None) -> float | None:
    """The base of learned frequencies; None if none are learned."""
    if config is None or config.kind != "mixed":
        return None
    return _settings(config)[0]


def rotate(
    qkv: Float[Array, "b n c"], angles: Float[Array, "b n *h m"], width: int
) -> Float[Array, "b n c"]:
    """Turns the pairs of all queries and keys, in float32; values stay.

    Args:
      qkv: as for `navit.model.attention.attention_qkvpacked`.
      angles: of each pair, the same in all heads or each head's own.
      width: channels of a head.
    """
    return _turned(qkv, jnp.cos(angles), jnp.sin(angles), width)


def _turned(
    qkv: Float[Array, "b n c"],
    cos: Float[Array, "b n *h m"],
    sin: Float[Array, "b n *h m"],
    width: int,
) -> Float[Array, "b n c"]:
    b, n, channels = qkv.shape
    # If heads are split over devices, each device has its queries, keys and values.
    mesh, apart, together = jax.sharding.get_abstract_mesh(), None, None
    shards = 1
    if not mesh.empty:
        rows, _, over = (*jax.typeof(qkv).sharding.spec, None, None, None)[:3]
        axes = (over,) if isinstance(over, str) else over or ()
        shards = math.prod(mesh.shape[axis] for axis in axes)
        apart = jax.P(rows, None, over, None, None, None, None)
        together = jax.P(rows, None, over)
    heads = channels // (3 * width * shards)
    parts = jax.lax.reshape(
        qkv, (b, n, shards, 3, heads, 2, width // 2), out_sharding=apart
    )

    def for_heads(x: Array) -> Array:
        shape = (b, n, 1, 1, 1, width // 2)
        if x.ndim == 4:
            shape = (b, n, shards, 1, heads, width // 2)
        split = None
        if apart is not None:
            split = jax.P(rows, None, over if x.ndim == 4 else None, None, None, None)
        return jax.lax.reshape(x, shape, out_sharding=split)

    c, s = for_heads(cos), for_heads(sin)
    turning = parts[:, :, :, :2].astype(jnp.float32)
    x, y = turning[..., 0, :], turning[..., 1, :]
    turned = jnp.stack([x * c - y * s, y * c + x * s], -2).astype(qkv.dtype)
    out = jnp.concatenate([turned, parts[:, :, :, 2:]], 3)
    return jax.lax.reshape(out, qkv.shape, out_sharding=together)


def _angles(
    places: Float[Array, "b n 2"], frequency: Float[Array, "*h 2 m"]
) -> Float[Array, "b n *h m"]:
    """Sums of products in float32, since a matrix product might round positions."""
    row, column = frequency[..., 0, :][None, None], frequency[..., 1, :][None, None]
    over = range(2, row.ndim)
    y, x = (jnp.expand_dims(places[..., axis], tuple(over)) for axis in (0, 1))
    return y * row + x * column


def _settings(config: RotaryConfig) -> tuple[float, str, int]:
    theta, coordinates, reference = _PRESETS[config.kind]
    return (
        theta if config.theta is None else config.theta,
        coordinates if config.coordinates is None else config.coordinates,
        reference if config.reference is None else config.reference,
    )
