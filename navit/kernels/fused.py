"""Code shared by the kernels around attention (Pallas, for TPUs).

`fused_mlp` computes `x + down(gelu(up(norm(x))))`, and `norm_project` the norm and the
product before attention. Both take one block of tokens at a time while the weights stay
in the chip's vector memory. Intermediate values between norm and residual, up to four
times as wide as x, never reach main memory. The backward pass recomputes them from x,
so nothing else is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from navit.kernels.splash_blocks import LANES, WHOLE_ROW
from navit.sharding import platform

EPSILON = 1e-6
# Most tokens, and most channels of the widest array, in one step.
_TOKENS, _CHANNELS = 1024, 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel divides its work.

    Attributes:
      axes: the mesh axes that rows are split over.
      tokens: tokens in one block.
      channels: channels of the widest array in one step.
      transposed: the projection is written, and its gradient read, as `[b, c, n]`.
      interpret: simulate the kernel on any device, slowly, for tests.
      eps: of the norm.
    """

    axes: tuple[str, ...]
    tokens: int
    channels: int
    transposed: bool
    interpret: Any
    eps: float = EPSILON


def fits(x: Array, hidden: int, axes: tuple[str, ...]) -> bool:
    """Whether the kernels can run here: on a TPU with room for the weights.

    The width and each device's number of tokens must be multiples of 128.

    Args:
      x: `[b, n, d]`.
      hidden: channels of the widest array.
    """
    if platform() != "tpu" or x.shape[-1] % LANES:
        return False
    # With two cores to a chip, their gradients would have to be summed.
    return pltpu.get_tpu_info().num_cores == 1 and bool(block_tokens(x, hidden, axes))


def block_tokens(
    x: Array | jax.ShapeDtypeStruct,
    hidden: int,
    axes: tuple[str, ...],
    in_rows: bool = False,
) -> int:
    """Tokens in one block: the most that divide a device's tokens and fit; 0 if none.

    Args:
      x: `[b, n, d]`.
      hidden: channels of the widest array.
      axes: the mesh axes that b is split over.
      in_rows: blocks must divide a row instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    count = x.shape[1] if in_rows else x.shape[0] * x.shape[1] // devices
    room = math.inf
    if platform() == "tpu":
        room = 0.9 * pltpu.get_tpu_info().vmem_capacity_bytes
    # A row in one block fills a matrix unit's columns best.
    for size in range(WHOLE_ROW if in_rows else _TOKENS, 0, -LANES):
        if count % size == 0 and _vmem(size, x.shape[-1], hidden, x.dtype) < room:
            return size
    return 0


def chunks(hidden: int) -> tuple[int, int]:
    """The number of hidden channels after padding, and the number in each step."""
    least = min(256, -(-hidden // LANES) * LANES)
    more, size = min(
        (-hidden % size, -size) for size in range(least, _CHANNELS + 1, LANES)
    )
    return hidden + more, -size


def _vmem(tokens: int, width: int, hidden: int, dtype: Any) -> int:
    """Vector memory of the MLP's backward kernel, in bytes.

    Weights, gradients, and blocks twice. The projection has one matrix instead of two.
    """
    size = jnp.dtype(dtype).itemsize
    hidden, channels = chunks(hidden)
    matrices = 2 * width * hidden * (size + 4)
    blocks = tokens * width * (3 * 2 * size + size + 3 * 4)
    return matrices + blocks + 12 * tokens * channels * 4 + 4 * 2**20


def on_each_device(
    plan: Plan, run: Callable[..., Any], weights: Any, gradients: int = 0
) -> Callable[..., Any]:
    """`run(x, weights, *gradients)` on each device's rows.

    With gradients, it also returns those of the weights: each device's partial sums.
    """
    if not plan.axes:
        return run
    rows, unreduced = jax.P(plan.axes), set(plan.axes)
    weight_specs: Any = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, weights)
    partial_sums: Any = jax.tree.map(
        lambda w: jax.P(*[None] * w.ndim, unreduced=unreduced), weights
    )
    # check_vma=False: a kernel does not declare the axes over which its results vary.
    mapped: Any = jax.shard_map(
        run,
        in_specs=(rows, weight_specs) + (rows,) * gradients,
        out_specs=(rows, partial_sums) if gradients else rows,
        check_vma=False,
    )
    return mapped


def gradients(
    plan: Plan, local: Callable[..., Any], x: Array, weights: Any, *above: Array
) -> tuple[Array, Any]:
    """The gradients of x and weights, from those that `local` returns on each device.

    Args:
      x: `[b, n, d]`.
      above: the gradients of the outputs, `[b, n, ...]` each.
    """

    def cast(x: Array, weights: Any, *above: Array) -> tuple[Array, Any]:
        dx, d_weights = local(x, weights, *above)
        d_weights = jax.tree.map(lambda g, w: g.astype(w.dtype), d_weights, weights)
        return dx.reshape(x.shape), d_weights

    run = on_each_device(plan, cast, weights, len(above))
    above = tuple(g.astype(x.dtype) for g in above)
    dx, d_weights = run(x, weights, *above)

    # Replicated vectors are summed here, and matrices where they were gathered.
    def summed(gradient: Array, weight: Array) -> Array:
        spec = jax.typeof(gradient).sharding.spec
        if not spec.unreduced or jax.typeof(weight).sharding.spec.reduced:
            return gradient
        return jax.reshard(gradient, jax.P())

    return dx, jax.tree.map(summed, d_weights, weights)


class Call:
    """The shapes of one call, and the code that its kernels share."""

    def __init__(self, plan: Plan, x: Array, weights: Any) -> None:
        self.plan, self.dtype, self.weights = plan, x.dtype, weights
        self.flat = x.reshape(-1, x.shape[-1])
        self.width, self.hidden = weights[2].shape
        self.grid = (self.flat.shape[0] // plan.tokens, self.hidden // plan.channels)
        # The share of steps that are the first (or the last) of a block of tokens.
        self.once = 1 / self.grid[1]
        self.like_x = jax.ShapeDtypeStruct(self.flat.shape, x.dtype)
        self.tokens = pl.BlockSpec((plan.tokens, self.width), lambda i, j: (i, 0))
        self.channels = pl.BlockSpec((plan.tokens, plan.channels), lambda i, j: (i, j))
        if plan.transposed:
            blocks = x.shape[1] // plan.tokens  # in a row
            self.channels = pl.BlockSpec(
                (None, plan.channels, plan.tokens),
                lambda i, j: (i // blocks, j, i % blocks),
            )
            self.weights = self.weights._replace(
                kernel=self.weights.kernel.T,
                kernel_bias=self.weights.kernel_bias[:, None],
            )

    def whole(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """A whole array, in vector memory from the first step to the last."""
        return pl.BlockSpec(
            shape, lambda i, j: (0, 0), pipeline_mode=pl.Buffered(buffer_count=1)
        )

    def backward(
        self,
        kernel: Any,
        args: tuple[Array, ...],
        *,
        inputs: tuple[pl.BlockSpec, ...],
        sums: tuple[tuple[int, ...], ...],
        products: int,
        name: str,
    ) -> Any:
        """Calls a kernel for the gradient of x and for sums over all tokens.

        The kernel begins with `begin` and ends with `end`.

        Args:
          args: inputs of the kernel besides x and the weights.
          inputs: their blocks.
          sums: the shapes of the sums.
          products: matrix products of a token with a weight matrix.
        """
        return self(
            kernel,
            args,
            inputs=inputs,
            outputs=(self.tokens, *map(self.whole, sums)),
            shapes=(
                self.like_x,
                *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums],
            ),
            products=products,
            taken=(self.once, 1 / self.grid[0], self.once / self.grid[0], self.once),
            name=name,
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
                *[self.whole(w.shape) for w in weights],
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
            # For `navit compile`: the share of steps that run each `pl.when`.
            metadata={"taken": " ".join(map(str, taken))},
            name=name,
        )(self.flat, *weights, *args)

    def chunk(self) -> Any:
        """The slice of channels that this step computes."""
        start = pl.program_id(1) * self.plan.channels
        return pl.ds(pl.multiple_of(start, LANES), self.plan.channels)

    def parts(self, size: int = 256) -> list[slice]:
        """Splits a block's tokens into slices of `size`, if that divides them."""
        tokens = self.plan.tokens
        size = tokens if tokens % size else size
        return [slice(i, i + size) for i in range(0, tokens, size)]

    def norm(
        self, x: Any, scale: Any, bias: Any, normed: Any, part: slice = slice(None)
    ) -> None:
        """Writes the norm of a block's tokens to `normed`."""
        standard, _ = _standardize(x[part], self.plan.eps)
        normed[part] = (standard * scale[...] + bias[...]).astype(self.dtype)

    def begin(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        normed: Any,
        total: Any,
        *,
        chunks: tuple[Any, ...],
        vectors: Any,
    ) -> None:
        """Starts a step of a backward kernel: recomputes the norm and clears sums.

        Args:
          total: the gradient of the norm's output.
          chunks: this step's channels of the sums over all tokens.
          vectors: sums over all tokens for the gradients of vectors: scale, bias, ...
        """
        block, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _norm() -> None:
            self.norm(x, scale, bias, normed)
            total[...] = jnp.zeros_like(total)

        @pl.when(block == 0)
        def _chunks() -> None:
            for each in chunks:
                each[...] = jnp.zeros(each.shape, jnp.float32)

        @pl.when((block == 0) & (step == 0))
        def _vectors() -> None:
            vectors[...] = jnp.zeros_like(vectors)

    def end(
        self, x: Any, scale: Any, total: Any, above: Any, dx: Any, vectors: Any
    ) -> None:
        """Ends a step of a backward kernel: once `total` is complete, adds the norm.

        Args:
          above: the gradient along the residual, which bypasses the norm. Its sum goes
            to the third vector, if there is one.
        """

        @pl.when(pl.program_id(1) == self.grid[1] - 1)
        def _norm() -> None:
            d_normed, residual = total[...], above[...].astype(jnp.float32)
            standard, inverse = _standardize(x[...], self.plan.eps)
            inner = d_normed * scale[...]
            mean = inner.mean(-1, keepdims=True)
            along = (inner * standard).mean(-1, keepdims=True)
            below = inverse * (inner - mean - standard * along)
            dx[...] = (residual + below).astype(self.dtype)
            sums = (d_normed * standard, d_normed, residual)
            for i, each in enumerate(sums[: vectors.shape[0]]):
                vectors[i : i + 1] += each.sum(0, keepdims=True)


def _standardize(x: Array, eps: float) -> tuple[Array, Array]:
    """The norm without scale and bias, and one over the standard deviation.

    Args:
      x: `[n, d]`.
    """
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * inverse, inverse
