"""What a transformer block does around attention, as TPU kernels (Pallas).

`fused_mlp` is `x + down(gelu(up(norm(x))))`, and `norm_project` the norm and the
product before attention. Both take a block of tokens at a time while the weights stay
in the chip's vector memory. What lies between norm and residual, up to four times as
wide as the rest, never goes to memory, and the backward pass makes it again from x
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

from navit.model.splash import LANES
from navit.sharding import platform

EPSILON = 1e-6
# Of one step: tokens, and channels of the widest array.
_TOKENS, _CHANNELS = 1024, 512
_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class MlpWeights(NamedTuple):
    """Matrices in the compute dtype, whole on each device; vectors in float32."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    up: Float[Array, "d f"]
    up_bias: Float[Array, " f"]
    down: Float[Array, "f d"]
    down_bias: Float[Array, " d"]


class ProjectWeights(NamedTuple):
    """As `MlpWeights`."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    kernel: Float[Array, "d c"]
    kernel_bias: Float[Array, " c"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut up.

    Attributes:
      axes: the mesh axes that rows are split over.
      tokens: of one block.
      channels: of the widest array, in one step.
      transposed: the projection is written, and its gradient read, as `[b, c, n]`.
      interpret: run on any device, slowly: for tests.
    """

    axes: tuple[str, ...]
    tokens: int
    channels: int
    transposed: bool
    interpret: Any


def fits(x: Array, hidden: int, axes: tuple[str, ...]) -> bool:
    """Whether the kernels run here: on a TPU with room for the weights.

    No if the width is no multiple of 128 channels, or a device's tokens none of 128.

    Args:
      hidden: channels of the widest array.
    """
    if platform() != "tpu" or x.shape[-1] % LANES:
        return False
    # The gradients of a chip's two cores would have to be summed.
    return pltpu.get_tpu_info().num_cores == 1 and bool(_tokens(x, hidden, axes))


def fused_mlp(
    x: Float[Array, "b n d"],
    weights: MlpWeights,
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
    hidden = weights.up.shape[1]
    tokens = _tokens(x, hidden, axes)
    if not tokens:
        raise ValueError(f"no kernel for x {x.shape} and {hidden} hidden channels")
    plan = Plan(axes, tokens, _chunks(hidden)[1], False, interpret)
    return _mlp(plan, x, weights)


def norm_project(
    x: Float[Array, "b n d"],
    weights: ProjectWeights,
    *,
    transposed: bool = False,
    axes: tuple[str, ...] = (),
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "b n c"], Float[Array, "b n d"]]:
    """`norm(x) @ kernel + bias`, and x for the residual: so that the sum of its two
    gradients is made here too. c is a multiple of d.

    Args:
      transposed: the product lies in memory as `[b, c, n]`, for who reads it so. Rows
        must be of a multiple of 128 tokens.
      axes, interpret: see `fused_mlp`.
    """
    width, channels = weights.kernel.shape
    tokens = _tokens(x, channels, axes, in_rows=transposed)
    if not tokens or channels % width:
        raise ValueError(f"no kernel for x {x.shape} and kernel {(width, channels)}")
    # Queries, keys and values are three chunks.
    return _project(Plan(axes, tokens, width, transposed, interpret), x, weights)


def _tokens(x: Array, hidden: int, axes: tuple[str, ...], in_rows: bool = False) -> int:
    """Of one block: what divides a device's tokens, or a row's, and has room; or 0."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    count = x.shape[1] if in_rows else x.shape[0] * x.shape[1] // devices
    room = math.inf
    if platform() == "tpu":
        room = 0.9 * pltpu.get_tpu_info().vmem_capacity_bytes
    for size in range(_TOKENS, 0, -LANES):
        if count % size == 0 and _vmem(size, x.shape[-1], hidden, x.dtype) < room:
            return size
    return 0


def _chunks(hidden: int) -> tuple[int, int]:
    """Channels with padding, and how many of them a step takes."""
    least = min(256, -(-hidden // LANES) * LANES)
    more, size = min(
        (-hidden % size, -size) for size in range(least, _CHANNELS + 1, LANES)
    )
    return hidden + more, -size


def _vmem(tokens: int, width: int, hidden: int, dtype: Any) -> int:
    """Bytes of the MLP's backward kernel: weights, gradients, blocks twice. The
    projection's has one matrix of the two."""
    size = jnp.dtype(dtype).itemsize
    hidden, channels = _chunks(hidden)
    matrices = 2 * width * hidden * (size + 4)
    blocks = tokens * width * (3 * 2 * size + size + 3 * 4)
    return matrices + blocks + 12 * tokens * channels * 4 + 4 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(plan: Plan, x: Array, weights: MlpWeights) -> Array:
    return _mlp_forward(plan, x, weights)[0]


def _mlp_forward(
    plan: Plan, x: Array, weights: MlpWeights
) -> tuple[Array, tuple[Array, MlpWeights]]:
    def local(x: Array, weights: MlpWeights) -> Array:
        call = _Call(plan, x, _padded(plan, weights))
        (y,) = call(
            functools.partial(_mlp_forward_kernel, call),
            (),
            inputs=(),
            outputs=(call.tokens,),
            shapes=(jax.ShapeDtypeStruct(call.flat.shape, x.dtype),),
            products=2,
            taken=(call.once, call.once),
            name="mlp_forward",
        )
        return y.reshape(x.shape)

    return _on_each_device(plan, local, weights)(x, weights), (x, weights)


def _mlp_backward(
    plan: Plan, saved: tuple[Array, MlpWeights], gradient: Array
) -> tuple[Array, MlpWeights]:
    def local(
        x: Array, weights: MlpWeights, gradient: Array
    ) -> tuple[Array, MlpWeights]:
        call = _Call(plan, x, _padded(plan, weights))
        width, hidden = call.width, call.hidden
        whole = ((width, hidden), (width, hidden), (1, hidden), (3, width))
        dx, up, down, up_bias, vectors = call(
            functools.partial(_mlp_backward_kernel, call),
            (gradient.reshape(call.flat.shape),),
            inputs=(call.tokens,),
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
        found = MlpWeights(
            *(vectors[0], vectors[1]),
            *(up[:, :cut], up_bias[0, :cut]),
            *(down[:, :cut].T, vectors[2]),
        )
        return dx.reshape(x.shape), _like(found, weights)

    x, weights = saved
    run = _on_each_device(plan, local, weights, 1)
    dx, found = run(x, weights, gradient.astype(x.dtype))
    return dx, _summed(found, weights)


_mlp.defvjp(_mlp_forward, _mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(plan: Plan, x: Array, weights: ProjectWeights) -> tuple[Array, Array]:
    return _project_forward(plan, x, weights)[0]


def _project_forward(
    plan: Plan, x: Array, weights: ProjectWeights
) -> tuple[tuple[Array, Array], tuple[Array, ProjectWeights]]:
    def local(x: Array, weights: ProjectWeights) -> Array:
        call = _Call(plan, x, weights)
        b, n, _ = x.shape
        shape = (b, call.hidden, n) if plan.transposed else (b * n, call.hidden)
        (y,) = call(
            functools.partial(_project_forward_kernel, call),
            (),
            inputs=(),
            outputs=(call.channels,),
            shapes=(jax.ShapeDtypeStruct(shape, x.dtype),),
            products=1,
            taken=(call.once,),
            name="project_forward",
        )
        return y.swapaxes(1, 2) if plan.transposed else y.reshape(b, n, -1)

    return (_on_each_device(plan, local, weights)(x, weights), x), (x, weights)


def _project_backward(
    plan: Plan,
    saved: tuple[Array, ProjectWeights],
    gradients: tuple[Array, Array],
) -> tuple[Array, ProjectWeights]:
    def local(
        x: Array, weights: ProjectWeights, gradient: Array, above: Array
    ) -> tuple[Array, ProjectWeights]:
        call = _Call(plan, x, weights)
        width, hidden = call.width, call.hidden
        if plan.transposed:
            gradient = gradient.swapaxes(1, 2)
        else:
            gradient = gradient.reshape(-1, hidden)
        matrix = (hidden, width) if plan.transposed else (width, hidden)
        whole = (matrix, (1, hidden), (2, width))
        dx, kernel, kernel_bias, vectors = call(
            functools.partial(_project_backward_kernel, call),
            (gradient, above.reshape(call.flat.shape)),
            inputs=(call.channels, call.tokens),
            outputs=(call.tokens, *map(call.whole, whole)),
            shapes=(
                jax.ShapeDtypeStruct(call.flat.shape, x.dtype),
                *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in whole),
            ),
            products=2,
            taken=(call.once, 1 / call.grid[0], call.once / call.grid[0], call.once),
            name="project_backward",
        )
        kernel = kernel.T if plan.transposed else kernel
        found = ProjectWeights(vectors[0], vectors[1], kernel, kernel_bias[0])
        return dx.reshape(x.shape), _like(found, weights)

    x, weights = saved
    run = _on_each_device(plan, local, weights, 2)
    dx, found = run(x, weights, *(g.astype(x.dtype) for g in gradients))
    return dx, _summed(found, weights)


_project.defvjp(_project_forward, _project_backward)


def _on_each_device(
    plan: Plan, run: Callable[..., Any], weights: Any, gradients: int = 0
) -> Callable[..., Any]:
    if not plan.axes:
        return run
    rows, unreduced = jax.P(plan.axes), set(plan.axes)
    of: Any = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, weights)
    # Each device has its own part of the sums.
    parts: Any = jax.tree.map(
        lambda w: jax.P(*(None,) * w.ndim, unreduced=unreduced), weights
    )
    # check_vma: a kernel does not say over which axes its results vary.
    mapped: Any = jax.shard_map(
        run,
        in_specs=(rows, of, *(rows,) * gradients),
        out_specs=(rows, parts) if gradients else rows,
        check_vma=False,
    )
    return mapped


def _summed(found: Any, weights: Any) -> Any:
    """Vectors, whole everywhere, are summed here; matrices where they were gathered."""

    def whole(gradient: Array, weight: Array) -> Array:
        spec = jax.typeof(gradient).sharding.spec
        if not spec.unreduced or jax.typeof(weight).sharding.spec.reduced:
            return gradient
        return jax.reshard(gradient, jax.P())

    return jax.tree.map(whole, found, weights)


def _like(found: Any, weights: Any) -> Any:
    return jax.tree.map(lambda g, w: g.astype(w.dtype), found, weights)


def _padded(plan: Plan, weights: MlpWeights) -> MlpWeights:
    more = -weights.up.shape[1] % plan.channels
    if not more:
        return weights
    return weights._replace(  # with zeros: gelu(0) = 0
        up=jnp.pad(weights.up, ((0, 0), (0, more))),
        up_bias=jnp.pad(weights.up_bias, (0, more)),
        down=jnp.pad(weights.down, ((0, more), (0, 0))),
    )


class _Call:
    """One call's shapes, and what the kernels share."""

    def __init__(self, plan: Plan, x: Array, weights: Any) -> None:
        self.plan, self.dtype, self.weights = plan, x.dtype, weights
        self.flat = x.reshape(-1, x.shape[-1])
        self.width, self.hidden = weights[2].shape
        self.grid = (self.flat.shape[0] // plan.tokens, self.hidden // plan.channels)
        # The share of steps that are the first, or the last, of a block of tokens.
        self.once = 1 / self.grid[1]
        self.tokens = pl.BlockSpec((plan.tokens, self.width), lambda i, j: (i, 0))
        self.channels = pl.BlockSpec((plan.tokens, plan.channels), lambda i, j: (i, j))
        if plan.transposed:
            a_row = x.shape[1] // plan.tokens
            self.channels = pl.BlockSpec(
                (None, plan.channels, plan.tokens),
                lambda i, j: (i // a_row, j, i % a_row),
            )
            self.weights = self.weights._replace(
                kernel=self.weights.kernel.T,
                kernel_bias=self.weights.kernel_bias[:, None],
            )

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
        inputs: tuple[pl.BlockSpec, ...],
        outputs: tuple[pl.BlockSpec, ...],
        shapes: tuple[jax.ShapeDtypeStruct, ...],
        products: int,
        taken: tuple[float, ...],
        name: str,
    ) -> Any:
        weights = [w[None] if w.ndim == 1 else w for w in self.weights]
        block = (self.plan.tokens, self.width)
        arrays: list[Any] = [self.flat, *weights, *args, *shapes]
        count = self.flat.shape[0]
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[
                self.tokens,
                *(self.whole(w.shape) for w in weights),
                *inputs,
            ],
            out_specs=list(outputs),
            out_shape=list(shapes),
            scratch_shapes=[
                pltpu.VMEM(block, self.dtype),
                pltpu.VMEM(block, jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"),
                vmem_limit_bytes=_vmem(
                    self.plan.tokens, self.width, self.hidden, self.dtype
                ),
            ),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * count * self.width * self.hidden,
                transcendentals=count * self.hidden,
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
        """The channels of this step."""
        start = pl.program_id(1) * self.plan.channels
        return pl.ds(pl.multiple_of(start, LANES), self.plan.channels)

    def norm(self, x: Any, scale: Any, bias: Any, normed: Any) -> None:
        standard, _ = _standardize(x[...])
        normed[...] = (standard * scale[...] + bias[...]).astype(self.dtype)

    def norm_backward(
        self, x: Any, scale: Any, d_normed: Array, above: Array, dx: Any
    ) -> Array:
        """Writes the gradient of x, with what comes from above; returns that of the
        scale, token by token."""
        standard, inverse = _standardize(x[...])
        inner = d_normed * scale[...]
        mean = inner.mean(-1, keepdims=True)
        along = (inner * standard).mean(-1, keepdims=True)
        below = inverse * (inner - mean - standard * along)
        dx[...] = (above + below).astype(self.dtype)
        return d_normed * standard


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


def _mlp_forward_kernel(
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
        call.norm(x, scale, bias, normed)
        total[...] = x[...].astype(jnp.float32) + down_bias[...]

    at = call.chunk()
    made = _gelu(call.dot(normed[...], up[:, at], (1, 0)) + up_bias[:, at])[0]
    total[...] += call.dot(made.astype(call.dtype), down[at], (1, 0))

    @pl.when(pl.program_id(1) == call.grid[1] - 1)
    def _last() -> None:
        y[...] = total[...].astype(call.dtype)


def _mlp_backward_kernel(
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
    block, step, at = pl.program_id(0), pl.program_id(1), call.chunk()

    @pl.when(step == 0)
    def _() -> None:
        call.norm(x, scale, bias, normed)
        total[...] = jnp.zeros_like(total)

    @pl.when(block == 0)
    def _start() -> None:
        for sums in (d_up, d_down, d_up_bias):
            sums[:, at] = jnp.zeros((sums.shape[0], call.plan.channels), jnp.float32)

    @pl.when((block == 0) & (step == 0))
    def _clear() -> None:
        d_vectors[...] = jnp.zeros_like(d_vectors)

    made, slope = _gelu(call.dot(normed[...], up[:, at], (1, 0)) + up_bias[:, at])
    d_made = call.dot(gradient[...], down[at], (1, 1)) * slope
    d_up_bias[:, at] += d_made.sum(0, keepdims=True)
    made, d_made = made.astype(call.dtype), d_made.astype(call.dtype)
    total[...] += call.dot(d_made, up[:, at], (1, 1))
    d_up[:, at] += call.dot(normed[...], d_made, (0, 0))
    # Transposed, so that the wide one of the two stays in the matrix unit.
    d_down[:, at] += call.dot(gradient[...], made, (0, 0))

    @pl.when(step == call.grid[1] - 1)
    def _last() -> None:
        d_normed, above = total[...], gradient[...].astype(jnp.float32)
        d_scale = call.norm_backward(x, scale, d_normed, above, dx)
        for i, each in enumerate((d_scale, d_normed, above)):
            d_vectors[i : i + 1] += each.sum(0, keepdims=True)


def _project_forward_kernel(
    call: _Call,
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

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        call.norm(x, scale, bias, normed)

    at = call.chunk()
    if call.plan.transposed:
        made = call.dot(kernel[at], normed[...], (1, 1)) + kernel_bias[at]
    else:
        made = call.dot(normed[...], kernel[:, at], (1, 0)) + kernel_bias[:, at]
    y[...] = made.astype(call.dtype)


def _project_backward_kernel(
    call: _Call,
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
    block, step, at = pl.program_id(0), pl.program_id(1), call.chunk()
    along = (at,) if call.plan.transposed else (slice(None), at)

    @pl.when(step == 0)
    def _() -> None:
        call.norm(x, scale, bias, normed)
        total[...] = jnp.zeros_like(total)

    @pl.when(block == 0)
    def _start() -> None:
        d_kernel[along] = jnp.zeros_like(d_kernel[along])
        d_kernel_bias[:, at] = jnp.zeros((1, call.plan.channels), jnp.float32)

    @pl.when((block == 0) & (step == 0))
    def _clear() -> None:
        d_vectors[...] = jnp.zeros_like(d_vectors)

    if call.plan.transposed:
        # A product turns the sums over lanes as they are kept.
        ones = jnp.ones((16, call.plan.tokens), call.dtype)
        d_kernel_bias[:, at] += call.dot(ones, gradient[...], (1, 1))[:1]
        total[...] += call.dot(gradient[...], kernel[at], (0, 0))
        d_kernel[at] += call.dot(gradient[...], normed[...], (1, 0))
    else:
        d_kernel_bias[:, at] += gradient[...].astype(jnp.float32).sum(0, keepdims=True)
        total[...] += call.dot(gradient[...], kernel[:, at], (1, 1))
        d_kernel[:, at] += call.dot(normed[...], gradient[...], (0, 0))

    @pl.when(step == call.grid[1] - 1)
    def _last() -> None:
        d_normed, residual = total[...], above[...].astype(jnp.float32)
        d_scale = call.norm_backward(x, scale, d_normed, residual, dx)
        for i, each in enumerate((d_scale, d_normed)):
            d_vectors[i : i + 1] += each.sum(0, keepdims=True)
