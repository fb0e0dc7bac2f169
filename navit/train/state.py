"""The state that training updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from navit.config import Config
from navit.model.two_tower import TwoTower
from navit.sharding import Rules


class TrainState(NamedTuple):
    """The number of steps taken (a scalar), the model and the optimizer state."""

    step: jax.Array
    model: TwoTower
    opt_state: Any


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    rules: Rules,
    model: TwoTower | None = None,
) -> TrainState:
    """The state at step 0; under `jax.eval_shape`, its shapes and shardings.

    Args:
      model: the model to start from; None initializes one randomly.
    """
    if model is None:
        model = TwoTower(config.model, rules, rngs=nnx.Rngs(config.train.seed))
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
