"""The patch merger between a native-resolution tower and a language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from navit.batch import PackedTokens
from navit.config import MergerConfig
from navit.model.layers import linear, make_norm
from navit.sharding import Rules


class Merger(nnx.Module):
    """Joins the tokens of each block of patches, and maps them to `out_dim`.

    A norm of each token or none, the block's tokens side by side, row by row, and two
    linear layers around an exact GELU: Qwen2-VL's `PatchMerger` (arXiv 2409.12191) and
    the projectors of Kimi-VL (arXiv 2504.07491) and Pixtral (arXiv 2410.07073).
    """

    def __init__(
        self,
        config: MergerConfig,
        width: int,
        *,
        dtype: Any,
        rules: Rules,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        joined = config.side**2 * width
        hidden = config.hidden_dim or joined
        shared: Any = dict(use_bias=True, dtype=dtype, rngs=rngs)
        self.norm = (
            make_norm(config.norm, width, eps=config.eps, **shared)
            if config.norm != "none"
            else None
        )
        self.up = linear(joined, hidden, names=("embed", None), rules=rules, **shared)
        self.down = linear(
            hidden, config.out_dim, names=("embed", None), rules=rules, **shared
        )

    @jax.named_scope("merger")
    def __call__(self, packed: PackedTokens) -> PackedTokens:
        """Rows of n tokens -> rows of n / side**2, with grids and coords to match.

        Args:
          packed: whole images or clips, in any order: none of their tokens may be
            dropped. Of a clip, the blocks of each frame are joined.

        Raises:
          ValueError: outside jit, if a grid is not a whole number of blocks.
        """
        side = self.config.side
        check_grids(packed.grids, side)
        block = side**2
        tokens, segment_ids, coords, grids = (jnp.asarray(x) for x in packed)
        order = _by_block(segment_ids, coords, grids, side)
        sides = jnp.array([1, side, side][-grids.shape[-1] :])
        order = order[:, : order.shape[1] // block * block]

        def blocks(x: Array) -> Array:
            x = jnp.take_along_axis(x, order[..., None], axis=1)
            return x.reshape(x.shape[0], -1, block, x.shape[-1])

        x = blocks(tokens if self.norm is None else self.norm(tokens))
        x = x.reshape(*x.shape[:2], -1)
        x = self.down(jax.nn.gelu(self.up(x), approximate=False))
        ids = blocks(segment_ids[..., None])[:, :, 0, 0]
        x = jnp.where((ids > 0)[..., None], x, jnp.zeros((), x.dtype))
        return PackedTokens(x, ids, blocks(coords)[:, :, 0] // sides, grids // sides)


def check_grids(grids: Any, side: int) -> None:
    """Raises ValueError for a grid with a side that blocks do not fill; not in jit."""
    if isinstance(grids, jax.core.Tracer):
        return
    flat = np.asarray(grids)[..., -2:].reshape(-1, 2)
    wrong = flat[(flat % side != 0).any(-1)]
    if len(wrong):
        rows, columns = wrong[0]
        raise ValueError(
            f"a grid of {rows}x{columns} patches is not made of {side}x{side} blocks, "
            "which the merger joins: take the model's own strategy, or one with "
            f"merge={side}"
        )


def _by_block(
    segment_ids: Int[Array, "b n"],
    coords: Int[Array, "b n a"],
    grids: Int[Array, "b s a"],
    side: int,
) -> Int[Array, "b n"]:
    """The order of a row's tokens by image, block and place in the block."""
    lengths = grids.prod(-1)
    starts = jnp.cumsum(lengths, -1) - lengths
    slot = jnp.maximum(segment_ids - 1, 0)
    start = jnp.take_along_axis(starts, slot, axis=1)
    rows, columns = (
        jnp.take_along_axis(grids[..., axis], slot, axis=1) for axis in (-2, -1)
    )
    row, column = coords[..., -2], coords[..., -1]
    place = (row // side) * (columns // side) + column // side
    place = start + place * side**2 + (row % side) * side + column % side
    if coords.shape[-1] == 3:
        place = place + coords[..., 0] * rows * columns
    return jnp.argsort(jnp.where(segment_ids > 0, place, jnp.iinfo(jnp.int32).max), -1)
