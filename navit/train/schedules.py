"""Schedules: the learning rate at each step, as a factor from 0 to 1."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from navit.config import OptimConfig

# The share of a schedule that cools down where `optim.cooldown_steps` is None, as in
# arXiv 2405.18392, section 4.
_COOLDOWN = 0.2


def make_shape(config: OptimConfig, steps: int) -> optax.Schedule:
    """The factor of `config.lr` against the step; a run has `steps` of them.

    With `config.start`, only the last part of a longer schedule that ends at `steps`.
    """
    total = round(steps / (1 - config.start))
    warmup = min(config.warmup_steps, total - 1)
    if config.schedule == "cosine":
        whole = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total)
    else:
        whole = _cooled(config, warmup, total)
    return lambda step: whole(step + total - steps)


def _cooled(config: OptimConfig, warmup: int, total: int) -> optax.Schedule:
    """Warm-up, a plateau or a falling root, and a cool-down: a product of the three.

    As `create_learning_rate_schedule` in big_vision's big_vision/utils.py.
    """
    cooldown = config.cooldown_steps
    if cooldown is None:
        cooldown = round(_COOLDOWN * total)
    if config.schedule == "constant":
        cooldown = 0

    def whole(step: Any) -> Any:
        factor = jnp.ones((), jnp.float32)
        if config.schedule == "rsqrt":
            past = jnp.maximum(step - warmup, 0)
            factor = 1 / jnp.sqrt(1 + past / config.timescale)
        if warmup:
            factor = factor * jnp.minimum(1.0, step / warmup)
        if cooldown:
            factor = factor * jnp.clip((total - step) / cooldown, 0.0, 1.0)
        return factor

    return whole
