"""Layer-wise learning-rate decay, by timm's rule.

timm's `param_groups_layer_decay` (timm/optim/_param_groups.py) with the groups of its
vision transformer: what comes before the blocks, each block (the last one with the norm
after it), and what comes after them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# The parts of a tower before its first block.
_STEM = ("patch", "position", "registers", "pre_norm", "embedding")


def depths(params: Any) -> dict[str, int]:
    """The number of blocks of each tower."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        tower, *names = names_of(path)
        if names[:2] == ["encoder", "blocks"]:
            found[tower] = x.shape[0]
    return found


def layer_factor(
    decay: float, path: tuple, ndim: int, layers: dict[str, int]
) -> float | np.ndarray:
    """The factor of a parameter's learning rate; of stacked blocks, one for each.

    Args:
      ndim: the axes of the parameter; blocks are stacked along the first.
      layers: the number of blocks of each tower.
    """
    tower, *names = names_of(path)
    if tower not in layers:  # the scale and bias of the logits
        return 1.0
    depth = layers[tower]
    if names[:2] == ["encoder", "blocks"]:
        factors = decay ** np.arange(depth, 0, -1, dtype=np.float32)
        return factors.reshape(-1, *[1] * (ndim - 1))
    if names[0] in _STEM:
        return decay ** (depth + 1)
    return decay if names[0] == "encoder" else 1.0


def names_of(path: tuple) -> list[str]:
    """The attributes on the way to a leaf, outermost first."""
    return [str(getattr(key, "name", "")) for key in path]
