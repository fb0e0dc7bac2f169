"""The nearest of many vectors: exact, in blocks, over the devices of the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from navit.sharding import Rules


def nearest(
    queries: np.ndarray,
    candidates: np.ndarray,
    *,
    k: int,
    query_block: int = 1024,
    candidate_block: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k candidates that have the largest dot products with each query.

    Among equal candidates, the lower index comes first. Products are float32.
    No more than `query_block x candidate_block` of them are held on a device at a time.
    Each device takes its share of the queries; all devices hold the candidates.

    Args:
      queries: `[m, e]`.
      candidates: `[c, e]`.
      k: at most the number of candidates.

    Returns:
      Products `[m, k]`, the largest first, and indices of candidates `[m, k]`.

    Raises:
      ValueError: if k is out of range or a vector has NaN.
    """
    count = len(candidates)
    if not 1 <= k <= count:
        raise ValueError(f"k={k} must be from 1 to {count}, the number of candidates")
    mesh = jax.sharding.get_mesh()
    rules = Rules() if mesh.empty else Rules(batch=tuple(mesh.axis_names))

    def place(x: np.ndarray, spec: jax.P | None) -> Any:
        if spec is None:
            return jax.device_put(x)
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    candidate_block = max(k, min(candidate_block, count))
    blocks = _padded(candidates, candidate_block).reshape(
        -1, candidate_block, candidates.shape[1]
    )
    placed = place(blocks, rules(None))
    devices = 1 if mesh.empty else mesh.size
    at_once = devices * min(query_block, -(-len(queries) // devices) or 1)
    padded = _padded(queries, at_once)
    products = np.zeros((len(padded), k), np.float32)
    indices = np.zeros((len(padded), k), np.int32)
    for start in range(0, len(padded), at_once):
        part = slice(start, start + at_once)
        block = place(padded[part], rules.rows(2))
        products[part], indices[part] = _top(block, placed, count, k=k, rules=rules)
    products, indices = products[: len(queries)], indices[: len(queries)]
    if np.isnan(products).any():
        raise ValueError("a vector has NaN: leave it out before the search")
    return products, indices


def _padded(x: np.ndarray, multiple: int) -> np.ndarray:
    """float32 rows `[m, e]`, with zeros up to a multiple of rows."""
    out = np.zeros((-(-len(x) // multiple) * multiple, x.shape[1]), np.float32)
    out[: len(x)] = x
    return out


@functools.partial(jax.jit, static_argnames=("k", "rules"))
def _top(
    queries: Float[Array, "m e"],
    blocks: Float[Array, "blocks c e"],
    count: int | Int[Array, ""],
    *,
    k: int,
    rules: Rules,
) -> tuple[Float[Array, "m k"], Int[Array, "m k"]]:
    """Takes the top k of each block, then of all; `top_k` keeps the order of equals."""

    def top_of_block(
        numbered: tuple[Int[Array, ""], Float[Array, "c e"]],
    ) -> tuple[Float[Array, "m k"], Int[Array, "m k"]]:
        number, block = numbered
        index = number * len(block) + jnp.arange(len(block))
        # A TPU's default is to round the vectors to bfloat16.
        products = jnp.matmul(queries, block.T, precision="highest")
        # `top_k` would put 0 before -0, which are equal.
        products = jnp.where(products == 0, 0, products)
        products, place = jax.lax.top_k(jnp.where(index < count, products, -jnp.inf), k)
        return products, number * len(block) + place

    products, indices = jax.lax.map(top_of_block, (jnp.arange(len(blocks)), blocks))
    products, indices = (
        x.transpose(1, 0, 2).reshape(len(queries), -1) for x in (products, indices)
    )
    products, place = jax.lax.top_k(products, k)
    indices = jnp.take_along_axis(indices, place, 1)
    return rules.replicate(products), rules.replicate(indices)
