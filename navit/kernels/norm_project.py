"""The norm and the product before attention, as TPU kernels (see `fused.py`)."""

from __future__ import annotations

import functools
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
    gradients,
    on_each_device,
)
from navit.kernels.splash_blocks import dot


class ProjectWeights(NamedTuple):
    """A replicated matrix in the compute dtype, and vectors in float32."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    kernel: Float[Array, "d c"]
    kernel_bias: Float[Array, " c"]


def norm_project(
    x: Float[Array, "b n d"],
    weights: ProjectWeights,
    *,
    transposed: bool = False,
    axes: tuple[str, ...] = (),
    eps: float = EPSILON,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "b n c"], Float[Array, "b n d"]]:
    """Returns `norm(x) @ kernel + bias`, and x for the residual.

    Returning x lets the backward kernel sum its two gradients.

    Args:
      weights: c must be a multiple of d.
      transposed: store the product as `[b, c, n]` in memory, for kernels that read this
        layout. The row length must be a multiple of 128 tokens.
      axes, eps, interpret: see `navit.kernels.fused_mlp.fused_mlp`.

    Raises:
      ValueError: if the kernels do not support these shapes (see
        `navit.kernels.fused.fits`).
    """
    width, channels = weights.kernel.shape
    tokens = block_tokens(x, channels, axes, in_rows=transposed)
    if not tokens or channels % width:
        raise ValueError(f"no kernel for x {x.shape} and kernel {(width, channels)}")
    # One step each for queries, keys and values.
    plan = Plan(axes, tokens, width, transposed, interpret, eps)
    return _project(plan, x, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(
    plan: Plan, x: Float[Array, "b n d"], weights: ProjectWeights
) -> tuple[Float[Array, "b n c"], Float[Array, "b n d"]]:
    return _project_forward(plan, x, weights)[0]


def _project_forward(
    plan: Plan, x: Float[Array, "b n d"], weights: ProjectWeights
) -> tuple[tuple[Array, Array], tuple[Array, ProjectWeights]]:
    def local(x: Array, weights: ProjectWeights) -> Array:
        call = Call(plan, x, weights)
        b, n, _ = x.shape
        shape = (b, call.hidden, n) if plan.transposed else (b * n, call.hidden)
        (y,) = call(
            functools.partial(_project_forward_kernel, call),
            (),
            inputs=(),
            outputs=(call.channels,),
            shapes=(jax.ShapeDtypeStruct(shape, x.dtype),),
            products=1,
            taken=(call.once, 1 - call.once),
            name="project_forward",
        )
        return y.swapaxes(1, 2) if plan.transposed else y.reshape(b, n, -1)

    return (on_each_device(plan, local, weights)(x, weights), x), (x, weights)


def _project_backward(
    plan: Plan,
    saved: tuple[Array, ProjectWeights],
    above: tuple[Float[Array, "b n c"], Float[Array, "b n d"]],
) -> tuple[Array, ProjectWeights]:
    def local(
        x: Array, weights: ProjectWeights, gradient: Array, residual: Array
    ) -> tuple[Array, ProjectWeights]:
        call = Call(plan, x, weights)
        width, hidden = call.width, call.hidden
        if plan.transposed:
            gradient = gradient.swapaxes(1, 2)
        else:
            gradient = gradient.reshape(-1, hidden)
        matrix = (hidden, width) if plan.transposed else (width, hidden)
        dx, kernel, kernel_bias, vectors = call.backward(
            functools.partial(_project_backward_kernel, call),
            (gradient, residual.reshape(call.flat.shape)),
            inputs=(call.channels, call.tokens),
            sums=(matrix, (1, hidden), (2, width)),
            products=2,
            name="project_backward",
        )
        kernel = kernel.T if plan.transposed else kernel
        return dx, ProjectWeights(vectors[0], vectors[1], kernel, kernel_bias[0])

    return gradients(plan, local, *saved, *above)


_project.defvjp(_project_forward, _project_backward)


def _project_forward_kernel(
    call: Call,
    x: Any,
    scale: Any,
    bias: Any,
    kernel: Any,
    kernel_bias: Any,
    y: Any,
    normed: Any,
    total: Any,
) -> None:
    del total

    at = call.chunk()

    def project(part: Any) -> None:
        if call.plan.transposed:
            out = dot(kernel[at], normed[part], (1, 1)) + kernel_bias[at]
            y[:, part] = out.astype(call.dtype)
        else:
            out = dot(normed[part], kernel[:, at], (1, 0)) + kernel_bias[:, at]
            y[part] = out.astype(call.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _first() -> None:
        # The norm of the next tokens overlaps with the product of these.
        for part in call.parts():
            call.norm(x, scale, bias, normed, part)
            project(part)

    @pl.when(pl.program_id(1) > 0)
    def _others() -> None:
        project(slice(None))


def _project_backward_kernel(
    call: Call,
    x: Any,
    scale: Any,
    bias: Any,
    kernel: Any,
    kernel_bias: Any,
    gradient: Any,
    above: Any,
    dx: Any,
    d_kernel: Any,
    d_kernel_bias: Any,
    d_vectors: Any,
    normed: Any,
    total: Any,
) -> None:
    del kernel_bias
    at = call.chunk()
    part = d_kernel.at[at] if call.plan.transposed else d_kernel.at[:, at]
    parts = (part, d_kernel_bias.at[:, at])
    call.begin(x, scale, bias, normed, total, chunks=parts, vectors=d_vectors)

    if call.plan.transposed:
        # Sums over lanes as a product, which also transposes them to a row.
        ones = jnp.ones((16, call.plan.tokens), call.dtype)
        d_kernel_bias[:, at] += dot(ones, gradient[...], (1, 1))[:1]
        total[...] += dot(gradient[...], kernel[at], (0, 0))
        d_kernel[at] += dot(gradient[...], normed[...], (1, 0))
    else:
        d_kernel_bias[:, at] += gradient[...].astype(jnp.float32).sum(0, keepdims=True)
        total[...] += dot(gradient[...], kernel[:, at], (1, 1))
        d_kernel[:, at] += dot(normed[...], gradient[...], (0, 0))
    call.end(x, scale, total, above, dx, d_vectors)
