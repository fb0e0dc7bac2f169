"""The case of `kernel_check.py` for the kernel of rotary positions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from navit.config import Config, RotaryConfig
from navit.kernels import turn as kernel
from navit.model import rotary
from navit.model.layers import compute_dtype
from navit.sharding import platform
from navit.train.comparison import Case, Implementation
from navit.train.kernel_cases import simulation

# Places of the tokens: up to this many patches a side.
_SIDE = 64


def turn_case(
    config: Config, ids: Int[np.ndarray, "b n"], *, tensor: int, only_used: bool
) -> Case | None:
    """The turn of queries and keys of one device's heads; None if nothing turns so.

    Args:
      tensor: the number of devices that heads are split over.
    """
    vision = config.model.vision
    if vision.rotary is None or vision.rotary.kind == "mixed":
        return None
    width, heads = vision.width // vision.num_heads, vision.num_heads // tensor
    why = None
    if not config.model.fused:
        why = "not used with model.fused=false"
    elif platform() == "gpu":
        why = "is a TPU kernel, and this runs on a gpu"
    elif not kernel.takes(ids.shape[1], heads, width):
        why = (
            f"does not take rows of {ids.shape[1]} tokens with {heads} heads of {width}"
        )
    if only_used and why:
        return None
    rng = np.random.default_rng(0)
    coords = jnp.asarray(rng.integers(0, _SIDE, (*ids.shape, 2)), jnp.int32)
    grid = jnp.full_like(coords, _SIDE)
    qkv = rng.standard_normal((*ids.shape, 3 * heads * width), np.float32)
    kind: RotaryConfig = vision.rotary

    def by_formula(qkv: Array, weights: None) -> Array:
        del weights
        return rotary.rotate(qkv, rotary.angles(kind, coords, grid, width), width)

    def by_kernel(qkv: Array, weights: None) -> Array:
        del weights
        angles = rotary.angles(kind, coords, grid, width)
        tables = kernel.tables(jnp.cos(angles), jnp.sin(angles), heads)
        return kernel.turn(qkv, tables, width, simulation())

    real = jnp.asarray(ids > 0)
    return Case(
        plain=by_formula,
        implementations=[
            Implementation("vision turn", by_kernel, why, bool(simulation()))
        ],
        inputs=(jnp.asarray(qkv, compute_dtype(config.model.dtype)),),
        weights=None,
        real=real,
        altered=real & jnp.asarray(ids == 1) & (jnp.arange(len(ids)) == 0)[:, None],
        terms=2,
    )
