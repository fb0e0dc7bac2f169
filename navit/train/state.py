"""What training changes, and nothing else."""

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
    """Attributes: steps taken, the model, and the optimizer's state."""

    step: jax.Array
    model: TwoTower
    opt_state: Any


def init_state(
    config: Config, optimizer: optax.GradientTransformation, rules: Rules
) -> TrainState:
    """The state at step 0; under `jax.eval_shape`, its shapes and shardings."""
    model = TwoTower(config.model, rules, rngs=nnx.Rngs(config.train.seed))
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
