"""Blocks, stacked and scanned; used for both images and text."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from navit.config import ModelConfig
from navit.kernels.splash import SAVED
from navit.model.block import Attend, Block, BlockOptions
from navit.model.layers import compute_dtype, make_norm
from navit.model.rotary import Rotation
from navit.sharding import Rules, platform

_log = logging.getLogger(__name__)


class Encoder(nnx.Module):
    """`depth` blocks in one stacked tree, run by one scan, and a final norm.

    `config.remat` selects what the backward pass keeps: "none" every activation,
    "attention" each block's input and what attention's backward pass needs, "dots" also
    the outputs of matrix products with parameters, and "full" only each block's input.
    "auto" is "dots" on a CPU, where reading memory takes longer than computing norms
    and activations again, and "none" elsewhere. TPU kernels (`fused`) always recompute
    their products, so "dots" then keeps no more than "attention".
    """

    def __init__(
        self,
        config: ModelConfig,
        options: BlockOptions,
        *,
        depth: int,
        rules: Rules,
        rngs: nnx.Rngs,
        final_norm: bool = True,
    ) -> None:
        self.remat, self.unroll = config.remat, config.scan_unroll
        self.rules, self.dtype = rules, compute_dtype(config.dtype)
        o, dtype, fused = options, self.dtype, config.fused
        self.unfused = tuple(o.unfused) if fused else ()

        @jax.vmap
        def make(key: jax.Array) -> Block:
            rngs = nnx.Rngs(key)
            return Block(o, dtype=dtype, rules=rules, rngs=rngs, fused=fused)

        self.blocks = make(jax.random.split(rngs.params(), depth))
        norm = functools.partial(
            make_norm, o.norm, o.width, eps=o.eps, use_bias=o.use_bias
        )
        self.norm = norm(dtype=dtype, rngs=rngs) if final_norm else None

    def __call__(
        self,
        x: Float[Array, "b n d"],
        attend: Attend,
        *,
        rotation: Rotation | None = None,
        full: Bool[np.ndarray, " l"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Runs the blocks.

        Args:
          rotation: how queries and keys turn.
          full: whether each block has full attention, which `attend` then takes as
            `full`.
        """
        if self.unfused and platform() == "tpu":
            _warn_unfused(self.unfused)

        def step(x: Array, scanned: Any) -> tuple[Array, None]:
            block, is_full = scanned
            own = attend
            if is_full is not None:
                own = functools.partial(attend, full=is_full)
            return block(x, own, rotation), None

        remat = self.remat
        if remat == "auto":
            remat = "dots" if platform() == "cpu" else "none"
        if remat != "none":
            keep = jax.checkpoint_policies
            attention = keep.save_only_these_names(SAVED)
            policy = {
                "dots": keep.save_from_both_policies(
                    keep.dots_with_no_batch_dims_saveable, attention
                ),
                "attention": attention,
                "full": keep.nothing_saveable,
            }[remat]
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(
            step, x.astype(self.dtype), (self.blocks, full), unroll=self.unroll
        )
        return x if self.norm is None else self.norm(x)


@functools.cache
def _warn_unfused(settings: tuple[str, ...]) -> None:
    _log.warning(
        "model.vision.%s: the TPU kernels around attention do not cover it, so plain "
        "products run in their place",
        ", ".join(settings),
    )
