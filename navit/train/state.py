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
    """What a step takes and returns.

    Attributes:
      step: the number of steps taken, a scalar.
      model: the weights.
      opt_state: the optimizer's.
      skipped: how many updates were left out because they were not finite, a scalar.
        Beyond `train.on_nonfinite`, the run is over and nothing changes any more.
      ema: the moving average of the weights; None without `optim.ema`.
    """

    step: jax.Array
    model: TwoTower
    opt_state: Any
    skipped: jax.Array
    ema: TwoTower | None = None

    @property
    def best(self) -> TwoTower:
        """The weights to evaluate: the average, if there is one."""
        return self.model if self.ema is None else self.ema


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
    # Copied, because a step donates both.
    ema = None if config.optim.ema is None else jax.tree.map(jnp.copy, model)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, model, optimizer.init(model), jnp.copy(zero), ema)
