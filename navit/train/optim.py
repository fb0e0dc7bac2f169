"""`OptimConfig` -> optax."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from navit.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate against step: linear warm-up, then a cosine to 0 at `steps`.

    With `config.start`, only the last part of a longer schedule that ends at `steps`.
    """
    shape = _make_shape(config, steps)
    return lambda step: config.lr * shape(step)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Adam on clipped gradients, with big_vision's weight decay.

    The decay is added after the learning rate and before the schedule, so each step
    shrinks a kernel by `weight_decay * schedule` of itself, with the schedule between 0
    and 1, whatever the learning rate and the tower's factor (`make` in big_vision's
    big_vision/optax.py). Only kernels decay: no bias, norm, embedding, position table
    or probe. A frozen tower (factor 0) has no moments and no decay.
    """
    trained = functools.partial(_trained, config)
    shape = _make_shape(config, steps)
    adam = optax.scale_by_adam(config.b1, config.b2)
    if 0 in (config.vision_lr, config.text_lr):
        adam = optax.masked(adam, trained)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam,
        optax.stateless(functools.partial(_scale, config)),
        optax.add_decayed_weights(
            config.weight_decay, functools.partial(_decayed, config)
        ),
        optax.scale_by_schedule(lambda step: -shape(step)),
    )


def _make_shape(config: OptimConfig, steps: int) -> optax.Schedule:
    """The schedule as a factor of the learning rate, from 0 to 1."""
    total = round(steps / (1 - config.start))
    warmup = min(config.warmup_steps, total - 1)
    whole = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total)
    return lambda step: whole(step + total - steps)


def _scale(config: OptimConfig, updates: Any, params: Any) -> Any:
    """Multiplies the updates by the learning rate and their tower's factor."""
    del params

    def scale(path: tuple, x: jax.Array) -> jax.Array:
        factor = _factor(config, path)
        if factor == 0:
            return jnp.zeros_like(x)  # even if x is NaN
        return x * (config.lr * factor)

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
