"""`OptimConfig` -> optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from navit.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate against step: linear warm-up, then a cosine to 0 at `steps`."""
    warmup = min(config.warmup_steps, steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, steps)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW; decay on matrices and tables only, not on norms and biases."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Any) -> Any:
    # Stacked blocks carry one axis more, so the axes say nothing; the names do.
    def decayed(path: tuple, _: Any) -> bool:
        names = {str(getattr(key, "name", getattr(key, "key", key))) for key in path}
        return not names & {"bias", "scale", "phase", "frequency"}

    return jax.tree_util.tree_map_with_path(decayed, params)
