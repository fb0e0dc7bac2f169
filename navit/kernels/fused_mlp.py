"""A block's MLP with its norm and residual, as TPU kernels (see `fused.py`)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from navit.kernels.fused import (
    EPSILON,
    Call,
    Plan,
    block_tokens,
    chunks,
    gradients,
    on_each_device,
)
from navit.kernels.splash_blocks import dot

_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class MlpWeights(NamedTuple):
    """Replicated matrices in the compute dtype, and vectors in float32."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    up: Float[Array, "d f"]
    up_bias: Float[Array, " f"]
    down: Float[Array, "f d"]
    down_bias: Float[Array, " d"]


def fused_mlp(
    x: Float[Array, "b n d"],
    weights: MlpWeights,
    *,
    axes: tuple[str, ...] = (),
    eps: float = EPSILON,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "b n d"]:
    """`x + down(gelu(up(norm(x))))`, with LayerNorm and the tanh-approximated GELU.

    Sums, the norm and the GELU are computed in float32.

    Args:
      axes: the mesh axes that b is split over.
      eps: of the norm.
      interpret: `pltpu.InterpretParams()` simulates the kernels on a CPU, for tests.

    Raises:
      ValueError: if the kernels do not support these shapes (see `fits`).
    """
    hidden = weights.up.shape[1]
    tokens = block_tokens(x, hidden, axes)
    if not tokens:
        raise ValueError(f"no kernel for x {x.shape} and {hidden} hidden channels")
    plan = Plan(axes, tokens, chunks(hidden)[1], False, interpret, eps)
    return _mlp(plan, x, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(
    plan: Plan, x: Float[Array, "b n d"], weights: MlpWeights
) -> Float[Array, "b n d"]:
    return _mlp_forward(plan, x, weights)[0]


def _mlp_forward(
    plan: Plan, x: Float[Array, "b n d"], weights: MlpWeights
) -> tuple[Array, tuple[Array, MlpWeights]]:
    def local(x: Array, weights: MlpWeights) -> Array:
        call = Call(plan, x, _padded(plan, weights))
        (y,) = call(
            functools.partial(_mlp_forward_kernel, call),
            (),
            inputs=(),
            outputs=(call.tokens,),
            shapes=(call.like_x,),
            products=2,
            taken=(call.once, call.once),
            name="mlp_forward",
        )
        return y.reshape(x.shape)

    return on_each_device(plan, local, weights)(x, weights), (x, weights)


def _mlp_backward(
    plan: Plan, saved: tuple[Array, MlpWeights], gradient: Float[Array, "b n d"]
) -> tuple[Array, MlpWeights]:
    def local(
        x: Array, weights: MlpWeights, gradient: Array
    ) -> tuple[Array, MlpWeights]:
        call = Call(plan, x, _padded(plan, weights))
        width, hidden = call.width, call.hidden
        dx, up, down, up_bias, vectors = call.backward(
            functools.partial(_mlp_backward_kernel, call),
            (gradient.reshape(call.flat.shape),),
            inputs=(call.tokens,),
            sums=((width, hidden), (width, hidden), (1, hidden), (3, width)),
            products=5,
            name="mlp_backward",
        )
        cut = weights.up.shape[1]
        return dx, MlpWeights(
            scale=vectors[0],
            bias=vectors[1],
            up=up[:, :cut],
            up_bias=up_bias[0, :cut],
            down=down[:, :cut].T,
            down_bias=vectors[2],
        )

    return gradients(plan, local, *saved, gradient)


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _padded(plan: Plan, weights: MlpWeights) -> MlpWeights:
    """Pads the hidden channels to a multiple of a step's."""
    more = -weights.up.shape[1] % plan.channels
    if not more:
        return weights
    return weights._replace(  # with zeros: gelu(0) = 0
        up=jnp.pad(weights.up, ((0, 0), (0, more))),
        up_bias=jnp.pad(weights.up_bias, (0, more)),
        down=jnp.pad(weights.down, ((0, more), (0, 0))),
    )


def _gelu(x: Float[Array, "n f"]) -> tuple[Array, Array]:
    """The value and the slope of GELU."""
    square = x * x
    tanh = jnp.tanh(x * (_GELU + _GELU * _CUBIC * square))
    half = 0.5 + 0.5 * tanh
    inner = 0.5 * _GELU + 1.5 * _GELU * _CUBIC * square
    return x * half, half + x * (1 - tanh * tanh) * inner


def _mlp_forward_kernel(
    call: Call,
    x: Any,
    scale: Any,
    bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
    y: Any,
    normed: Any,
    total: Any,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        call.norm(x, scale, bias, normed)
        total[...] = x[...].astype(jnp.float32) + down_bias[...]

    at = call.chunk()
    matrix, vector = up[:, at], up_bias[:, at]

    def hidden(part: Any) -> Array:
        return dot(normed[part], matrix, (1, 0)) + vector

    # Issues the next product before this GELU, so that their units work in parallel.
    parts = call.parts(512)
    ahead = hidden(parts[0])
    for i, part in enumerate(parts):
        current = ahead
        ahead = hidden(parts[i + 1]) if i + 1 < len(parts) else current
        total[part] += dot(_gelu(current)[0].astype(call.dtype), down[at], (1, 0))

    @pl.when(pl.program_id(1) == call.grid[1] - 1)
    def _last() -> None:
        y[...] = total[...].astype(call.dtype)


def _mlp_backward_kernel(
    call: Call,
    x: Any,
    scale: Any,
    bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
    gradient: Any,
    dx: Any,
    d_up: Any,
    d_down: Any,
    d_up_bias: Any,
    d_vectors: Any,
    normed: Any,
    total: Any,
) -> None:
    del down_bias
    at = call.chunk()
    parts = tuple(sums.at[:, at] for sums in (d_up, d_down, d_up_bias))
    call.begin(x, scale, bias, normed, total, chunks=parts, vectors=d_vectors)

    hidden, slope = _gelu(dot(normed[...], up[:, at], (1, 0)) + up_bias[:, at])
    d_hidden = dot(gradient[...], down[at], (1, 1)) * slope
    d_up_bias[:, at] += d_hidden.sum(0, keepdims=True)
    hidden, d_hidden = hidden.astype(call.dtype), d_hidden.astype(call.dtype)
    total[...] += dot(d_hidden, up[:, at], (1, 1))
    d_up[:, at] += dot(normed[...], d_hidden, (0, 0))
    # Transposed, so that the wider operand stays in the matrix unit.
    d_down[:, at] += dot(gradient[...], hidden, (0, 0))
    call.end(x, scale, total, gradient, dx, d_vectors)
