"""Transformer blocks, stacked and scanned; used for both images and text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from navit.config import ModelConfig
from navit.kernels.fused import fits
from navit.kernels.fused_mlp import MlpWeights, fused_mlp
from navit.kernels.norm_project import ProjectWeights, norm_project
from navit.kernels.splash_blocks import LANES, heads_fill_lanes
from navit.model.layers import (
    Linear,
    add_bias,
    compute_dtype,
    layer_norm,
    linear,
    product,
)
from navit.sharding import Rules

# `navit.model.attention.attention_qkvpacked` with this batch's segment ids bound.
Attend = Callable[..., Array]  # (qkv, *, width)


class Mlp(nnx.Module):
    """Two linear layers around a tanh-approximated GELU.

    `fused`: use the TPU kernels that include the norm and the residual, if they fit.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        use_bias: bool,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
        fused: bool,
    ) -> None:
        make = functools.partial(
            linear, use_bias=use_bias, dtype=dtype, rules=rules, rngs=rngs
        )
        self.rules, self.fused = rules, fused and rules.tensor is None
        self.up = make(width, mlp_dim, names=("embed", "tensor"))
        self.down = make(mlp_dim, width, names=("tensor", "embed"))

    def __call__(
        self, norm: nnx.LayerNorm, x: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        """`x + mlp(norm(x))`."""
        rules = self.rules
        hidden = self.up.out_features
        if self.fused and fits(x, hidden, rules.batch_axes):
            width = x.shape[-1]
            up, down = (
                rules.gather(layer.kernel[...], x.dtype)
                for layer in (self.up, self.down)
            )
            weights = MlpWeights(
                scale=_vector(norm.scale, width),
                bias=_vector(norm.bias, width),
                up=up,
                up_bias=_vector(self.up.bias, hidden),
                down=down,
                down_bias=_vector(self.down.bias, width),
            )
            return fused_mlp(x, weights, axes=rules.batch_axes)
        y = jax.nn.gelu(self.up(norm(x)), approximate=True)
        return x + self.down(y, out_sharding=rules.rows(x.ndim))


def _vector(param: Any, size: int) -> Float[Array, " d"]:
    """The parameter's value, or zeros if the layer has no such parameter."""
    return jnp.zeros(size) if param is None else param[...]


class SelfAttention(nnx.Module):
    """Multi-head attention; the caller's `attend` decides which tokens see which."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        use_bias: bool,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
        fused: bool,
    ) -> None:
        self.num_heads, self.fused = num_heads, fused and rules.tensor is None
        make = functools.partial(
            linear, use_bias=use_bias, dtype=dtype, rules=rules, rngs=rngs
        )
        self.rules = rules
        self.query = make(width, width, names=("embed", "tensor"))
        self.key = make(width, width, names=("embed", "tensor"))
        self.value = make(width, width, names=("embed", "tensor"))
        self.out = make(width, width, names=("tensor", "embed"))
        norm = functools.partial(
            layer_norm, width // num_heads, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None

    def __call__(
        self, norm: nnx.LayerNorm, x: Float[Array, "b n d"], attend: Attend
    ) -> Float[Array, "b n d"]:
        """`x + attention(norm(x))`."""
        rules, width = self.rules, x.shape[-1] // self.num_heads
        axes = rules.batch_axes
        if self.query_norm is not None and self.key_norm is not None:
            qkv = self._normalized(norm(x))
        elif self.fused and fits(x, 3 * x.shape[-1], axes):
            (kernel, bias), size = self._joined(x.dtype), x.shape[-1]
            weights = ProjectWeights(
                scale=_vector(norm.scale, size),
                bias=_vector(norm.bias, size),
                kernel=kernel,
                kernel_bias=_vector(bias, 3 * size),
            )
            transposed = x.shape[1] % LANES == 0 and not heads_fill_lanes(
                self.num_heads, width
            )
            qkv, x = norm_project(x, weights, transposed=transposed, axes=axes)
        else:
            kernel, bias = self._joined(x.dtype)
            qkv = product(norm(x), kernel)
            qkv = qkv if bias is None else add_bias(qkv, bias)
        out = self.out(attend(qkv, width=width), out_sharding=rules.rows(x.ndim))
        return x + out

    def _joined(
        self, dtype: Any
    ) -> tuple[Float[Array, "d c"], Float[Array, " c"] | None]:
        """The kernel and bias that give queries, keys and values in one product."""
        layers = (self.query, self.key, self.value)
        kernels = [layer.kernel[...] for layer in layers]
        kernel = self._side_by_side(*kernels)
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        bias = self._side_by_side(*biases) if biases else None
        return self.rules.gather(kernel, dtype), bias

    def _normalized(self, x: Float[Array, "b n d"]) -> Float[Array, "b n c"]:
        """Queries and keys, normalised in each head, and values, side by side."""
        heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        apart = self.rules("batch", None, "tensor", None)
        together = self.rules("batch", None, "tensor")

        def normalized(layer: Linear, norm: Any) -> Array:
            y = norm(jax.lax.reshape(layer(x), heads, out_sharding=apart))
            return jax.lax.reshape(y, x.shape, out_sharding=together)

        q = normalized(self.query, self.query_norm)
        k = normalized(self.key, self.key_norm)
        return self._side_by_side(q, k, self.value(x))

    def _side_by_side(self, *arrays: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        """Concatenates along the last axis; on each device, if `tensor` splits it."""
        shards = self.rules.size("tensor")
        if shards == 1:
            return jnp.concatenate(arrays, -1)
        if self.num_heads % shards:
            raise ValueError(
                f"{self.num_heads} heads cannot be split over mesh.tensor={shards}"
            )
        *shape, width = arrays[0].shape
        axes = (*jax.typeof(arrays[0]).sharding.spec, *[None] * len(shape))[
            : len(shape)
        ]
        apart = (*shape, shards, width // shards)
        split = jax.P(*axes, self.rules.tensor, None)
        arrays = tuple(jax.lax.reshape(x, apart, out_sharding=split) for x in arrays)
        return jax.lax.reshape(
            jnp.stack(arrays, -2),
            (*shape, len(arrays) * width),
            out_sharding=jax.P(*axes, self.rules.tensor),
        )


class Block(nnx.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        qk_norm: bool,
        use_bias: bool,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
        fused: bool,
    ) -> None:
        norm = functools.partial(
            layer_norm, width, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
        shared: Any = dict(
            use_bias=use_bias, dtype=dtype, rules=rules, rngs=rngs, fused=fused
        )
        self.attention_norm = norm()
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm, **shared)
        self.mlp_norm = norm()
        self.mlp = Mlp(width, mlp_dim, **shared)

    def __call__(
        self, x: Float[Array, "b n d"], attend: Attend
    ) -> Float[Array, "b n d"]:
        # Scopes name the parts in profiles and in `navit compile`.
        with jax.named_scope("attention"):
            x = self.attention(self.attention_norm, x, attend)
        with jax.named_scope("mlp"):
            return self.mlp(self.mlp_norm, x)


class Encoder(nnx.Module):
    """`depth` blocks in one stacked tree, run by one scan, and a final norm.

    `config.remat` selects what the backward pass keeps: "none" every activation, "dots"
    the outputs of matrix products with parameters, "attention" each block's input and
    what attention's backward pass needs, "full" only each block's input. TPU kernels
    (`fused`) always recompute their products, so "dots" then keeps almost nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        width: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        qk_norm: bool,
        use_bias: bool,
        rules: Rules,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat, self.unroll = config.remat, config.scan_unroll
        self.rules, self.dtype = rules, compute_dtype(config.dtype)
        shared = dict(use_bias=use_bias, dtype=self.dtype)
        fused = config.fused

        @jax.vmap
        def make(key: jax.Array) -> Block:
            return Block(
                width,
                mlp_dim,
                num_heads,
                qk_norm=qk_norm,
                rules=rules,
                rngs=nnx.Rngs(key),
                fused=fused,
                **shared,
            )

        self.blocks = make(jax.random.split(rngs.params(), depth))
        self.norm = layer_norm(width, rngs=rngs, **shared)

    def __call__(
        self, x: Float[Array, "b n d"], attend: Attend
    ) -> Float[Array, "b n d"]:
        def step(x: Array, block: Block) -> tuple[Array, None]:
            return block(x, attend), None

        if self.remat != "none":
            policy = {
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                "attention": jax.checkpoint_policies.save_only_these_names("attention"),
                "full": jax.checkpoint_policies.nothing_saveable,
            }[self.remat]
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(step, x.astype(self.dtype), self.blocks, unroll=self.unroll)
        return self.norm(x)
