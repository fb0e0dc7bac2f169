"""A path -> a model ready to use."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from flax import nnx

from navit.embed import Embedder
from navit.model.two_tower import TwoTower
from navit.sharding import Rules
from navit.train.checkpoint import Checkpoints


def load(path: str | Path, *, rules: Rules = Rules()) -> Embedder:
    """Loads a model with its config from a work directory of `navit train`.

    Args:
      rules: how to place the parameters on the mesh in use; one device without.

    Raises:
      FileNotFoundError: if there is no work directory or no checkpoint in it.
      ValueError: if the checkpoint is of a format that this version does not read.
    """
    checkpoints = Checkpoints(Path(path).expanduser())
    try:
        config = checkpoints.config()
        make = functools.partial(TwoTower, config.model, rules)
        like = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        model, step = checkpoints.restore_model(like)
        return Embedder(model, config, step=step)
    finally:
        checkpoints.close()
