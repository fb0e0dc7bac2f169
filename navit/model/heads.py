"""Pooling per segment: packed tokens -> one vector for every slot.

Sums over segments are products with the `[n, s]` membership matrix, which accelerators
compute faster than a scatter, and whose cost is linear in the row's length. (The
function `attention`, with the slots as queries, would compute a logit for every pair of
a slot and a token.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from navit.model.layers import layer_norm, linear
from navit.model.mlp import Mlp
from navit.sharding import Rules


def membership(segment_ids: Int[Array, "b n"], slots: int) -> Float[Array, "b n s"]:
    """1.0 where token n belongs to the image in slot s, else 0.0."""
    return jax.nn.one_hot(segment_ids - 1, slots, dtype=jnp.float32)


def mean_pool(
    x: Float[Array, "b n d"], member: Float[Array, "b n s"]
) -> Float[Array, "b s d"]:
    """Mean over each slot's tokens, in float32; 0 for an empty slot."""
    counts = jnp.maximum(member.sum(1), 1.0)
    return _segment_sum(x, member) / counts[..., None]


def max_pool(
    x: Float[Array, "b n d"], member: Float[Array, "b n s"]
) -> Float[Array, "b s d"]:
    """Maximum over each slot's tokens, in float32; 0 for an empty slot.

    Tied tokens share the gradient evenly.
    """
    x = x.astype(jnp.float32)
    top = _per_token(_segment_max(x, member), member)
    hit = (x == top).astype(jnp.float32) * member.max(-1)[..., None]
    hits = jnp.maximum(_segment_sum(hit, member), 1.0)
    return _segment_sum(x * hit, member) / hits


class MapHead(nnx.Module):
    """Attention pooling: one probe attends over each image's tokens; an MLP follows.

    big_vision's MAPHead (models/vit.py), with the softmax taken per segment.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        use_bias: bool,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads, self.rules = num_heads, rules
        shared = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        make = functools.partial(linear, width, width, **shared)
        init = jax.nn.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, width), jnp.float32))
        # Not sharded: it is applied only to the probe, never to rows.
        self.query = make(names=(None, None), rules=Rules())
        self.key = make(names=("embed", None), rules=rules)
        self.value = make(names=("embed", None), rules=rules)
        self.out = make(names=(None, "embed"), rules=rules)
        self.norm = layer_norm(width, **shared)
        self.mlp = Mlp(width, mlp_dim, rules=rules, fused=False, **shared)

    def __call__(
        self, x: Float[Array, "b n d"], member: Float[Array, "b n s"]
    ) -> Float[Array, "b s d"]:
        h, width = self.num_heads, x.shape[-1]
        weights = self.weights(x, member).astype(x.dtype)
        values = self.value(x).reshape(*x.shape[:2], h, width // h)
        values = values * weights[..., None]
        pooled = _segment_sum(values.reshape(x.shape), member).astype(x.dtype)
        pooled = self.out(pooled)
        return self.mlp(self.norm, pooled)

    def weights(
        self, x: Float[Array, "b n d"], member: Float[Array, "b n s"]
    ) -> Float[Array, "b n h"]:
        """How much each head takes from each token, in float32.

        Those of an image sum to 1; padding has 0.
        """
        h, width = self.num_heads, x.shape[-1]
        q = self.query(self.probe[...]).reshape(h, width // h)
        q = self.rules.gather(q, q.dtype)  # replicated already; sums its gradient
        k = self.key(x).reshape(*x.shape[:2], h, width // h)
        logits = jnp.einsum("hk,bnhk->bnh", q, k, preferred_element_type=jnp.float32)
        return _segment_softmax(logits * (width // h) ** -0.5, member)


def _segment_sum(
    x: Float[Array, "b n d"], member: Float[Array, "b n s"]
) -> Float[Array, "b s d"]:
    return jnp.einsum(
        "bns,bnd->bsd",
        member.astype(x.dtype),
        x,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _segment_max(
    x: Float[Array, "b n d"], member: Float[Array, "b n s"]
) -> Float[Array, "b s d"]:
    """Maximum per slot, without a gradient; 0 for an empty slot."""
    x = jax.lax.stop_gradient(x)
    top = jnp.where(member[..., None] > 0, x[:, :, None], -jnp.inf).max(1)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _per_token(
    x: Float[Array, "b s d"], member: Float[Array, "b n s"]
) -> Float[Array, "b n d"]:
    """Copies each slot's vector to its tokens, without rounding; padding gets 0."""
    return jnp.einsum("bsd,bns->bnd", x, member, precision=jax.lax.Precision.HIGHEST)


def _segment_softmax(
    logits: Float[Array, "b n h"], member: Float[Array, "b n s"]
) -> Float[Array, "b n h"]:
    """Softmax over the tokens of each slot; 0 at padding."""
    real = member.max(-1)[..., None] > 0
    top = _per_token(_segment_max(logits, member), member)
    weights = jnp.exp(jnp.where(real, logits - top, -jnp.inf))
    total = _per_token(_segment_sum(weights, member), member)
    return weights / jnp.where(real, total, 1.0)
