"""The transformer block of both towers: SigLIP 2's, and what other towers change."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from navit.kernels.fused import EPSILON, fits
from navit.kernels.norm_project import ProjectWeights, norm_project
from navit.kernels.splash_blocks import LANES, heads_fill_lanes
from navit.model.layers import (
    Linear,
    add_bias,
    layer_norm,
    linear,
    make_norm,
    product,
)
from navit.model.mlp import Mlp, Norm, scaled, vector
from navit.model.rotary import Rotation, learned_frequencies
from navit.sharding import Rules

# `navit.model.attention.attention_qkvpacked` with this batch's segment ids bound.
Attend = Callable[..., Array]  # (qkv, *, width)


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """The sizes and settings of a block; see `navit.config.VisionConfig`.

    `learned_theta`: the base of the first frequencies of rotary positions that every
    head learns; None learns none.
    """

    width: int
    mlp_dim: int
    num_heads: int
    qk_norm: bool = False
    use_bias: bool = True
    norm: Literal["layer", "rms"] = "layer"
    eps: float = EPSILON
    act: Literal["tanh", "exact", "quick", "silu"] = "tanh"
    gated: bool = False
    layer_scale: float | None = None
    learned_theta: float | None = None

    @property
    def unfused(self) -> list[str]:
        """The settings that the fused kernels do not cover, as `name=value`."""
        usual = BlockOptions(self.width, self.mlp_dim, self.num_heads)
        names = ("norm", "act", "gated", "layer_scale")
        return [
            f"{name}={getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(usual, name)
        ]


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
        learned_theta: float | None = None,
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
        self.frequencies = (
            nnx.Param(
                learned_frequencies(
                    rngs.params(),
                    num_heads,
                    width // num_heads,
                    learned_theta,
                    out_sharding=rules("tensor", None, None),
                )
            )
            if learned_theta is not None
            else None
        )

    def __call__(
        self,
        norm: Norm,
        x: Float[Array, "b n d"],
        attend: Attend,
        *,
        rotation: Rotation | None = None,
        scale: Float[Array, " d"] | None = None,
    ) -> Float[Array, "b n d"]:
        """`x + scale * attention(norm(x))`."""
        rules, width = self.rules, x.shape[-1] // self.num_heads
        axes = rules.batch_axes
        if self.query_norm is not None and self.key_norm is not None:
            qkv = self._normalized(norm(x))
        elif self.fused and fits(x, 3 * x.shape[-1], axes):
            assert isinstance(norm, nnx.LayerNorm)
            (kernel, bias), size = self._joined(x.dtype), x.shape[-1]
            weights = ProjectWeights(
                scale=vector(norm.scale, size),
                bias=vector(norm.bias, size),
                kernel=kernel,
                kernel_bias=vector(bias, 3 * size),
            )
            transposed = x.shape[1] % LANES == 0 and not heads_fill_lanes(
                self.num_heads, width
            )
            qkv, x = norm_project(
                x, weights, transposed=transposed, axes=axes, eps=norm.epsilon
            )
        else:
            kernel, bias = self._joined(x.dtype)
            qkv = product(norm(x), kernel)
            qkv = qkv if bias is None else add_bias(qkv, bias)
        if rotation is not None:
            learned = None if self.frequencies is None else self.frequencies[...]
            qkv = rotation.turn(qkv, width, learned)
        out = self.out(attend(qkv, width=width), out_sharding=rules.rows(x.ndim))
        return x + scaled(out, scale)

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
        options: BlockOptions,
        *,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
        fused: bool,
    ) -> None:
        o, width = options, options.width
        norm = functools.partial(
            make_norm, o.norm, width, eps=o.eps, use_bias=o.use_bias
        )
        shared: Any = dict(use_bias=o.use_bias, dtype=dtype, rules=rules, rngs=rngs)
        self.attention_norm = norm(dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(
            width,
            o.num_heads,
            qk_norm=o.qk_norm,
            fused=fused and o.norm == "layer",
            learned_theta=o.learned_theta,
            **shared,
        )
        self.mlp_norm = norm(dtype=dtype, rngs=rngs)
        self.mlp = Mlp(
            width,
            o.mlp_dim,
            fused=fused and not o.unfused,
            act=o.act,
            gated=o.gated,
            **shared,
        )
        scale = o.layer_scale
        self.attention_scale = None if scale is None else _filled(width, scale)
        self.mlp_scale = None if scale is None else _filled(width, scale)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        attend: Attend,
        rotation: Rotation | None = None,
    ) -> Float[Array, "b n d"]:
        attention, mlp = (
            None if scale is None else scale[...]
            for scale in (self.attention_scale, self.mlp_scale)
        )
        # Scopes name the parts in profiles and in `navit compile`.
        with jax.named_scope("attention"):
            x = self.attention(
                self.attention_norm, x, attend, rotation=rotation, scale=attention
            )
        with jax.named_scope("mlp"):
            return self.mlp(self.mlp_norm, x, mlp)


def _filled(width: int, value: float) -> nnx.Param:
    return nnx.Param(jnp.full((width,), value, jnp.float32))
