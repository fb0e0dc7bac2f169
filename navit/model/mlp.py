"""A block's MLP, with its norm and residual."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from navit.kernels.fused import fits
from navit.kernels.fused_mlp import MlpWeights, fused_mlp
from navit.model.layers import linear
from navit.sharding import Rules

Norm = nnx.LayerNorm | nnx.RMSNorm

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": functools.partial(jax.nn.gelu, approximate=True),
    "exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two linear layers around an activation, which a third layer may gate.

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
        act: str = "tanh",
        gated: bool = False,
    ) -> None:
        make = functools.partial(
            linear, use_bias=use_bias, dtype=dtype, rules=rules, rngs=rngs
        )
        self.rules, self.fused = rules, fused and rules.tensor is None
        self.act = act
        self.up = make(width, mlp_dim, names=("embed", "tensor"))
        self.down = make(mlp_dim, width, names=("tensor", "embed"))
        self.gate = make(width, mlp_dim, names=("embed", "tensor")) if gated else None

    def __call__(
        self,
        norm: Norm,
        x: Float[Array, "b n d"],
        scale: Float[Array, " d"] | None = None,
    ) -> Float[Array, "b n d"]:
        """`x + scale * mlp(norm(x))`."""
        rules = self.rules
        hidden = self.up.out_features
        if self.fused and fits(x, hidden, rules.batch_axes):
            assert isinstance(norm, nnx.LayerNorm)
            width = x.shape[-1]
            up, down = (
                rules.gather(layer.kernel[...], x.dtype)
                for layer in (self.up, self.down)
            )
            weights = MlpWeights(
                scale=vector(norm.scale, width),
                bias=vector(norm.bias, width),
                up=up,
                up_bias=vector(self.up.bias, hidden),
                down=down,
                down_bias=vector(self.down.bias, width),
            )
            return fused_mlp(x, weights, axes=rules.batch_axes, eps=norm.epsilon)
        act, normed = _ACTIVATIONS[self.act], norm(x)
        if self.gate is None:
            y = act(self.up(normed))
        else:
            y = act(self.gate(normed)) * self.up(normed)
        return x + scaled(self.down(y, out_sharding=rules.rows(x.ndim)), scale)


def scaled(
    y: Float[Array, "b n d"], scale: Float[Array, " d"] | None
) -> Float[Array, "b n d"]:
    """`scale * y` in float32 (LayerScale), or y."""
    if scale is None:
        return y
    return (y.astype(jnp.float32) * scale[None, None]).astype(y.dtype)


def vector(param: Any, size: int) -> Float[Array, " d"]:
    """The parameter's value, or zeros if the layer has no such parameter."""
    return jnp.zeros(size) if param is None else param[...]
