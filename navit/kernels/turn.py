"""The turn of queries and keys by rotary positions, as a TPU kernel.

XLA copies the joined array several times for it, since the halves of a head are not
whole tiles. The kernel reads and writes queries and keys once, and leaves values.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from navit.kernels.splash_blocks import LANES, SUBLANES, heads_fill_lanes, lane_groups

# Most elements of a block of queries or keys.
_BLOCK = 2**19


class Tables(NamedTuple):
    """Cosines and signed sines of each channel of a head: `[b, k, n]` or `[b, n, k]`.

    With `[b, n, k]`, they are repeated for the heads of a block: `[b, n, g * k]`.
    """

    cos: Float[Array, "b i j"]
    sin: Float[Array, "b i j"]


def tables(
    cos: Float[Array, "b n m"], sin: Float[Array, "b n m"], heads: int
) -> Tables:
    """Prepares the kernel's tables, once for all layers.

    Args:
      heads: of one device.
    """
    width = 2 * cos.shape[-1]
    whole, signed = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    if not heads_fill_lanes(heads, width):
        return Tables(whole.swapaxes(1, 2), signed.swapaxes(1, 2))
    group = max(lane_groups(heads, width))
    return Tables(jnp.tile(whole, (1, 1, group)), jnp.tile(signed, (1, 1, group)))


def takes(row_tokens: int, heads: int, width: int) -> bool:
    """Whether the kernel supports such rows and heads of one device."""
    if row_tokens % LANES:
        return False
    # Whole tiles: 8 rows of float32 for a head, 16 of bfloat16 for a block of heads.
    return heads_fill_lanes(heads, width) or (
        width % SUBLANES == 0 and heads * width % (2 * SUBLANES) == 0
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def turn(
    qkv: Float[Array, "b n c"], tables: Tables, width: int, interpret: Any = False
) -> Float[Array, "b n c"]:
    """Turns queries and keys; see `navit.model.rotary.rotate`. On one device.

    The tables have no gradient.
    """
    return _turn(qkv, tables, width, interpret)


def _forward(
    qkv: Float[Array, "b n c"], tables: Tables, width: int, interpret: Any
) -> tuple[Array, Tables]:
    return _turn(qkv, tables, width, interpret), tables


def _backward(
    width: int, interpret: Any, tables: Tables, gradient: Float[Array, "b n c"]
) -> tuple[Array, None]:
    back = _turn(gradient, tables._replace(sin=-tables.sin), width, interpret)
    return back, None


turn.defvjp(_forward, _backward)


def _turn(
    qkv: Float[Array, "b n c"], tables: Tables, width: int, interpret: Any
) -> Float[Array, "b n c"]:
    b, n, channels = qkv.shape
    heads = channels // (3 * width)
    lanes = heads_fill_lanes(heads, width)
    tokens = next(size for size in (1024, 512, 384, 256, 128) if n % size == 0)
    if lanes:
        group = max(lane_groups(heads, width))
        block, kernel = (None, tokens, group * width), _lanes_kernel
        table = (None, tokens, group * width)
        x, at, fixed = qkv, lambda i, t, j: (i, t, j), lambda i, t, j: (i, t, 0)
    else:
        fit = [
            g
            for g in range(1, heads + 1)
            if heads % g == 0
            and g * width % (2 * SUBLANES) == 0
            and (g <= 2 or g * width * tokens <= _BLOCK)
        ]
        group = max(fit)
        block, kernel = (None, group * width, tokens), _stacked_kernel
        table = (None, width, tokens)
        x = qkv.swapaxes(1, 2)
        at, fixed = lambda i, t, j: (i, j, t), lambda i, t, j: (i, 0, t)
    of_x, of_table = pl.BlockSpec(block, at), pl.BlockSpec(table, fixed)
    y = pl.pallas_call(
        functools.partial(kernel, group, width),
        grid=(b, n // tokens, 2 * heads // group),
        in_specs=[of_x, of_table, of_table],
        out_specs=of_x,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        input_output_aliases={0: 0},  # values stay where they are
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="turn",
    )(x, *tables)
    return y if lanes else y.swapaxes(1, 2)


def _stacked_kernel(heads: int, width: int, x: Any, cos: Any, sin: Any, y: Any) -> None:
    """Channels along sublanes: rolled by half a head, each half meets the other."""
    c, s = cos[...], sin[...]
    whole, turned = x[...].astype(jnp.float32), []
    for i in range(heads):
        part = whole[i * width : (i + 1) * width]
        turned.append(part * c + pltpu.roll(part, width // 2, 0) * s)
    y[...] = jnp.concatenate(turned, 0).astype(y.dtype)


def _lanes_kernel(heads: int, width: int, x: Any, cos: Any, sin: Any, y: Any) -> None:
    """Channels of several heads along lanes."""
    part, half, size = x[...].astype(jnp.float32), width // 2, heads * width
    lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
    other = jnp.where(
        lane % width < half,
        pltpu.roll(part, size - half, 1),
        pltpu.roll(part, half, 1),
    )
    y[...] = (part * cos[...] + other * sin[...]).astype(y.dtype)
