"""A transformer block's MLP with its norm and its residual, as TPU kernels (Pallas).

`x + down(gelu(up(norm(x))))`, forward and backward, a block of tokens at a time, while
the weights stay in the chip's vector memory: what lies between the two products, four
times as wide as the rest, never goes to memory. The backward pass makes it again from x
alone, so that nothing else needs to be kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from navit.sharding import platform

LANES, EPSILON = 128, 1e-6
_TOKENS, _CHANNELS = 512, 512
_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class Weights(NamedTuple):
    """Matrices in the compute dtype, whole on each device; vectors in float32."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    up: Float[Array, "d f"]
    up_bias: Float[Array, " f"]
    down: Float[Array, "f d"]
    down_bias: Float[Array, " d"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut up.

    Attributes:
      axes: the mesh axes that rows are split over.
      tokens: of one block.
      channels: of the hidden layer, in one step.
      interpret: run on any device, slowly: for tests.
    """

    axes: tuple[str, ...]
    tokens: int
    channels: int
    interpret: Any


def fused_mlp(
    x: Float[Array, "b n d"],
    weights: Weights,
    *,
    axes: tuple[str, ...] = (),
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "b n d"]:
    """`x + down(gelu(up(norm(x))))`, with LayerNorm and the tanh-approximated GELU.

    Sums, the norm and the GELU are float32.

    Args:
      axes: the mesh axes that b is split over.
      interpret: `pltpu.InterpretParams()` runs the kernels on a CPU, for tests.
    """
    tokens = _block_tokens(x, axes)
    assert tokens is not None, "see fits()"
    channels = _chunks(weights.up.shape[1])[1]
    return _fused(Plan(axes, tokens, channels, interpret), x, weights)


def fits(x: Array, hidden: int, axes: tuple[str, ...]) -> bool:
    """Whether the kernels run here: on a TPU with room for the weights.

    No if the width is no multiple of 128 channels, or a device's tokens none of 128.
    """
    if platform() != "tpu" or x.shape[-1] % LANES or not _block_tokens(x, axes):
        return False
    info = pltpu.get_tpu_info()
    # The gradients of a chip's two cores would have to be summed.
    if info.num_cores > 1:
        return False
    return _vmem(x.shape[-1], hidden, x.dtype) < 0.9 * info.vmem_capacity_bytes


def _block_tokens(x: Array, axes: tuple[str, ...]) -> int | None:
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    local = x.shape[0] * x.shape[1] // devices
    sizes = (_TOKENS, _TOKENS // 2, LANES)
    return next((size for size in sizes if local % size == 0), None)


def _chunks(hidden: int) -> tuple[int, int]:
    """Hidden channels, with padding, and how many of them a step takes."""
    best = min(
        (-(-hidden // size) * size - hidden, -size)
        for size in range(LANES, _CHANNELS + 1, LANES)
        if size >= 256 or hidden < 256
    )
    return hidden + best[0], -best[1]


def _vmem(width: int, hidden: int, dtype: Any) -> int:
    """Bytes of the backward kernel: weights once, their gradients, blocks twice."""
    size = jnp.dtype(dtype).itemsize
    hidden, channels = _chunks(hidden)
    matrices = 2 * width * hidden * (size + 4)
    blocks = _TOKENS * width * (3 * 2 * size + size + 3 * 4)
    return matrices + blocks + 12 * _TOKENS * channels * 4 + 4 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(plan: Plan, x: Array, weights: Weights) -> Array:
    return _fused_forward(plan, x, weights)[0]


def _fused_forward(
    plan: Plan, x: Array, weights: Weights
) -> tuple[Array, tuple[Array, Weights]]:
    run = _on_each_device(plan, functools.partial(_forward, plan), weights)
    return run(x, weights), (x, weights)


def _fused_backward(
    plan: Plan, saved: tuple[Array, Weights], gradient: Array
) -> tuple[Array, Weights]:
    x, weights = saved
    local = functools.partial(_backward, plan)
    run = _on_each_device(plan, local, weights, gradients=True)
    dx, found = run(x, weights, gradient.astype(x.dtype))
    if plan.axes:
        # Each device has its own part. That of a gathered matrix is summed where it was
        # gathered; vectors are whole everywhere.
        found = Weights(
            *(
                g if jax.typeof(w).sharding.spec.reduced else jax.reshard(g, jax.P())
                for g, w in zip(found, weights, strict=True)
            )
        )
    return dx, found


_fused.defvjp(_fused_forward, _fused_backward)


def _on_each_device(
    plan: Plan, run: Callable[..., Any], weights: Weights, gradients: bool = False
) -> Callable[..., Any]:
    if not plan.axes:
        return run
    rows = jax.P(plan.axes)
    of: Any = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, weights)
    unreduced = set(plan.axes)
    parts: Any = jax.tree.map(
        lambda w: jax.P(*(None,) * w.ndim, unreduced=unreduced), weights
    )
    # check_vma: a kernel does not say over which axes its results vary.
    mapped: Any = jax.shard_map(
        run,
        in_specs=(rows, of, rows) if gradients else (rows, of),
        out_specs=(rows, parts) if gradients else rows,
        check_vma=False,
    )
    return mapped


def _forward(plan: Plan, x: Array, weights: Weights) -> Array:
    call = _Call(plan, x, weights)
    (y,) = call(
        functools.partial(_forward_kernel, call),
        (),
        outputs=(call.tokens,),
        shapes=(jax.ShapeDtypeStruct(call.flat.shape, x.dtype),),
        products=2,
        taken=(call.once, call.once),
        name="mlp_forward",
    )
    return y.reshape(x.shape)


def _backward(
    plan: Plan, x: Array, weights: Weights, gradient: Array
) -> tuple[Array, Weights]:
    call = _Call(plan, x, weights)
    width, hidden = call.weights.up.shape
    whole = ((width, hidden), (width, hidden), (1, hidden), (3, width))
    dx, up, down, up_bias, vectors = call(
        functools.partial(_backward_kernel, call),
        (gradient.reshape(call.flat.shape),),
        outputs=(call.tokens, *map(call.whole, whole)),
        shapes=(
            jax.ShapeDtypeStruct(call.flat.shape, x.dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in whole),
        ),
        products=5,
        taken=(call.once, 1 / call.grid[0], call.once / call.grid[0], call.once),
        name="mlp_backward",
    )
    cut = weights.up.shape[1]
    found = Weights(
        *(vectors[0], vectors[1]),
        *(up[:, :cut], up_bias[0, :cut]),
        *(down[:, :cut].T, vectors[2]),
    )
    cast = (g.astype(w.dtype) for g, w in zip(found, weights, strict=True))
    return dx.reshape(x.shape), Weights(*cast)


class _Call:
    """One call's shapes, and what both kernels share."""

    def __init__(self, plan: Plan, x: Array, weights: Weights) -> None:
        self.plan, self.dtype = plan, x.dtype
        self.flat = x.reshape(-1, x.shape[-1])
        self.width, hidden = weights.up.shape
        more = -hidden % plan.channels
        if more:  # of zeros: gelu(0) = 0
            weights = weights._replace(
                up=jnp.pad(weights.up, ((0, 0), (0, more))),
                up_bias=jnp.pad(weights.up_bias, (0, more)),
                down=jnp.pad(weights.down, ((0, more), (0, 0))),
            )
        self.weights = weights
        hidden += more
        self.grid = (self.flat.shape[0] // plan.tokens, hidden // plan.channels)
        self.once = 1 / self.grid[1]
        self.tokens = pl.BlockSpec((plan.tokens, self.width), lambda i, j: (i, 0))

    def whole(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Stays in vector memory from the first step to the last."""
        return pl.BlockSpec(
            shape, lambda i, j: (0, 0), pipeline_mode=pl.Buffered(buffer_count=1)
        )

    def __call__(
        self,
        kernel: Any,
        args: tuple[Array, ...],
        *,
        outputs: tuple[pl.BlockSpec, ...],
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        products: int,
        taken: tuple[float, ...],
        name: str,
    ) -> Any:
        weights = [w[None] if w.ndim == 1 else w for w in self.weights]
        block = (self.plan.tokens, self.width)
        arrays: list[Any] = [self.flat, *weights, *args, *shapes]
        count, hidden = self.flat.shape[0], self.weights.up.shape[1]
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[
                self.tokens,
                *(self.whole(w.shape) for w in weights),
                *(self.tokens for _ in args),
            ],
            out_specs=list(outputs),
            out_shape=list(shapes),
            scratch_shapes=[
                pltpu.VMEM(block, self.dtype),
                pltpu.VMEM(block, jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"),
                vmem_limit_bytes=_vmem(self.width, hidden, self.dtype),
            ),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * count * self.width * hidden,
                transcendentals=count * hidden,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=self.plan.interpret,
            # For `navit compile`: the share of steps that runs each `pl.when`.
            metadata={"taken": " ".join(map(str, taken))},
            name=name,
        )(self.flat, *weights, *args)

    def dot(self, a: Array, b: Array, over: tuple[int, int]) -> Array:
        exact = self.dtype == jnp.float32
        return jax.lax.dot_general(
            a,
            b,
            (((over[0],), (over[1],)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    def chunk(self) -> Any:
        """The hidden channels of this step."""
        start = pl.program_id(1) * self.plan.channels
        return pl.ds(pl.multiple_of(start, LANES), self.plan.channels)


def _standardize(x: Array) -> tuple[Array, Array]:
    """Without scale and bias; and one over the standard deviation."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    return x * inverse, inverse


def _gelu(x: Array) -> tuple[Array, Array]:
    """Its value and its slope."""
    square = x * x
    tanh = jnp.tanh(x * (_GELU + _GELU * _CUBIC * square))
    half = 0.5 + 0.5 * tanh
    inner = 0.5 * _GELU + 1.5 * _GELU * _CUBIC * square
    return x * half, half + x * (1 - tanh * tanh) * inner


def _forward_kernel(
    call: _Call,
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
        standard, _ = _standardize(x[...])
        normed[...] = (standard * scale[...] + bias[...]).astype(call.dtype)
        total[...] = x[...].astype(jnp.float32) + down_bias[...]

    at = call.chunk()
    made = _gelu(call.dot(normed[...], up[:, at], (1, 0)) + up_bias[:, at])[0]
    total[...] += call.dot(made.astype(call.dtype), down[at], (1, 0))

    @pl.when(pl.program_id(1) == call.grid[1] - 1)
    def _() -> None:
        y[...] = total[...].astype(call.dtype)


def _backward_kernel(
    call: _Call,
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
    block, step = pl.program_id(0), pl.program_id(1)
    at = call.chunk()

    @pl.when(step == 0)
    def _() -> None:
        standard, _ = _standardize(x[...])
        normed[...] = (standard * scale[...] + bias[...]).astype(call.dtype)
        total[...] = jnp.zeros_like(total)

    @pl.when(block == 0)
    def _() -> None:
        for sums in (d_up, d_down, d_up_bias):
            sums[:, at] = jnp.zeros((sums.shape[0], call.plan.channels), jnp.float32)

    @pl.when((block == 0) & (step == 0))
    def _() -> None:
        d_vectors[...] = jnp.zeros_like(d_vectors)

    made, slope = _gelu(call.dot(normed[...], up[:, at], (1, 0)) + up_bias[:, at])
    d_hidden = call.dot(gradient[...], down[at], (1, 1)) * slope
    d_up_bias[:, at] += d_hidden.sum(0, keepdims=True)
    made, d_hidden = made.astype(call.dtype), d_hidden.astype(call.dtype)
    total[...] += call.dot(d_hidden, up[:, at], (1, 1))
    d_up[:, at] += call.dot(normed[...], d_hidden, (0, 0))
    # Transposed, so that the wide one of the two stays in the matrix unit.
    d_down[:, at] += call.dot(gradient[...], made, (0, 0))

    @pl.when(step == call.grid[1] - 1)
    def _() -> None:
        standard, inverse = _standardize(x[...])
        above, d_normed = gradient[...].astype(jnp.float32), total[...]
        inner = d_normed * scale[...]
        mean = inner.mean(-1, keepdims=True)
        along = (inner * standard).mean(-1, keepdims=True)
        dx[...] = (above + inverse * (inner - mean - standard * along)).astype(
            call.dtype
        )
        for i, each in enumerate((d_normed * standard, d_normed, above)):
            d_vectors[i : i + 1] += each.sum(0, keepdims=True)
