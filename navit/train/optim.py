"""`OptimConfig` -> optax."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from navit.config import OptimConfig
from navit.train.directions import direction
from navit.train.layer_decay import depths, layer_factor
from navit.train.schedules import make_shape


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate against step: a linear warm-up, then `config.schedule`.

    A cosine ends at 0 at `steps`. With `config.start`, only the last part of a longer
    schedule that ends at `steps`.
    """
    shape = make_shape(config, steps)
    return lambda step: config.lr * shape(step)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """`config.name` on clipped gradients, with big_vision's weight decay.

    The decay is added after the learning rate and before the schedule, so each step
    shrinks a kernel by `weight_decay * schedule` of itself, with the schedule between 0
    and 1, whatever the learning rate, the tower's factor and the layer's (`make` in
    big_vision's big_vision/optax.py). Only kernels decay: no bias, norm, embedding,
    position table or probe. A frozen tower (factor 0) has no moments and no decay.
    """
    trained = functools.partial(_trained, config)
    shape = make_shape(config, steps)
    steered = direction(config)
    if 0 in (config.vision_lr, config.text_lr):
        steered = optax.masked(steered, trained)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        steered,
        optax.stateless(functools.partial(_scale, config)),
        optax.add_decayed_weights(
            config.weight_decay, functools.partial(_decayed, config)
        ),
        optax.scale_by_schedule(lambda step: -shape(step)),
    )


def _scale(config: OptimConfig, updates: Any, params: Any) -> Any:
    """Multiplies updates by the learning rate, and their tower's and layer's factor."""
    del params
    layers = depths(updates) if config.layer_decay != 1 else {}

    def scale(path: tuple, x: jax.Array) -> jax.Array:
        factor = _factor(config, path)
        if factor == 0:
            return jnp.zeros_like(x)  # even if x is NaN
        x = x * (config.lr * factor)
        if layers:
            x = x * layer_factor(config.layer_decay, path, x.ndim, layers)
        return x

    return jax.tree_util.tree_map_with_path(scale, updates)


def _trained(config: OptimConfig, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _factor(config, path) > 0, params
    )


def _decayed(config: OptimConfig, params: Any) -> Any:
    def decayed(path: tuple, _: Any) -> bool:
        is_kernel = any(getattr(key, "name", None) == "kernel" for key in path)
        return is_kernel and _factor(config, path) > 0

    return jax.tree_util.tree_map_with_path(decayed, params)


def _factor(config: OptimConfig, path: tuple) -> float:
    factors = {"vision": config.vision_lr, "text": config.text_lr}
    return factors.get(getattr(path[0], "name", ""), 1.0)
