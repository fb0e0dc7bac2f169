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

    With `config.start`, the last part of a schedule so long that it ends at `steps`.
    """
    total = round(steps / (1 - config.start))
    warmup = min(config.warmup_steps, total - 1)
    whole = optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, total)
    return lambda step: whole(step + total - steps)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW; decay on matrices and tables only, not on norms and biases.

    The updates of a tower are multiplied by its factor, its decay with them. One that
    is frozen (factor 0) has no moments.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    if 0 in (config.vision_lr, config.text_lr):
        adamw = optax.masked(adamw, functools.partial(_trained, config))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adamw,
        optax.stateless(functools.partial(_scale_towers, config)),
    )


def _trained(config: OptimConfig, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _factor(config, path) > 0, params
    )


def _scale_towers(config: OptimConfig, updates: Any, params: Any) -> Any:
    del params

    def scale(path: tuple, x: jax.Array) -> jax.Array:
        factor = _factor(config, path)
        if factor == 0:
            return jnp.zeros_like(x)  # whatever it is: 0 times NaN is not 0
        return x if factor == 1.0 else x * factor

    return jax.tree_util.tree_map_with_path(scale, updates)


def _factor(config: OptimConfig, path: tuple) -> float:
    factors = {"vision": config.vision_lr, "text": config.text_lr}
    return factors.get(getattr(path[0], "name", ""), 1.0)


def _decayed(params: Any) -> Any:
    # Stacked blocks carry one axis more, so the axes say nothing; the names do.
    def decayed(path: tuple, _: Any) -> bool:
        names = {str(getattr(key, "name", getattr(key, "key", key))) for key in path}
        return not names & {"bias", "scale", "phase", "frequency"}

    return jax.tree_util.tree_map_with_path(decayed, params)
