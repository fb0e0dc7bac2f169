"""The part of an optimizer that turns gradients into the direction of an update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from navit.config import OptimConfig
from navit.train.layer_decay import names_of

# Muon's own momentum (github.com/KellerJordan/Muon), and the RMS of AdamW's updates,
# which its updates are scaled to (arXiv 2502.16982, section 2.2).
_MUON_MOMENTUM, _ADAM_RMS = 0.95, 0.2


def direction(config: OptimConfig) -> optax.GradientTransformation:
    """The optimizer `config.name`, without learning rate and weight decay."""
    if config.name == "adafactor":
        return _adafactor(config)
    if config.name == "muon":
        return _muon(config)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    return optax.scale_by_adam(config.b1, config.b2)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """`scale_by_adafactor` of big_vision/optax.py: no update clipping, no scaling."""

    def decay(step: jax.Array, exponent: float) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1.0
        return jnp.minimum(config.b2, 1.0 - t**-exponent)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay),
        optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices inside the network, Adam for everything else.

    Embeddings, the patch embedding, position tables, the layers that end a tower, and
    all vectors are Adam's.
    """
    return optax.partition(
        {
            "muon": optax.chain(_orthogonal(), optax.stateless(_resize)),
            "adam": optax.scale_by_adam(config.b1, config.b2),
        },
        _labels,
    )


def _labels(params: Any) -> Any:
    def label(path: tuple, _: Any) -> str:
        names = names_of(path)
        inside = "blocks" in names or names[:2] == ["vision", "head"]
        return "muon" if inside and "kernel" in names else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _as_matrices(updates: Any) -> Any:
    """The last two axes of each kernel are a matrix; blocks are stacked before them."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)


def _resize(updates: Any, params: Any) -> Any:
    """Scales orthogonal matrices, of which an element's RMS is 1/sqrt(longer side)."""
    del params
    return jax.tree.map(lambda x: x * (_ADAM_RMS * max(x.shape[-2:]) ** 0.5), updates)


def _orthogonal() -> optax.GradientTransformation:
    """optax's Muon, with shardings inside that the compiler chooses.

    The products of a sharded matrix with itself have no sharding of their own. The
    coefficients of Newton-Schulz are constants, so the state goes without them.
    """
    inner = contrib.scale_by_muon(
        beta=_MUON_MOMENTUM, weight_dimension_numbers=_as_matrices
    )

    def init(params: Any) -> Any:
        return inner.init(params)._replace(ns_coeffs=None)

    def bare_update(updates: Any, state: Any) -> Any:
        coefficients = inner.init(()).ns_coeffs
        whole = state._replace(ns_coeffs=coefficients)
        updates, whole = inner.update(updates, whole)
        return updates, whole._replace(ns_coeffs=None)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        if jax.sharding.get_abstract_mesh().empty:
            return bare_update(updates, state)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(bare_update, out_sharding=specs)(updates, state)

    return optax.GradientTransformation(init, update)
