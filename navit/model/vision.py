"""The image tower: packed patches -> tokens, and one vector for every slot."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from navit.batch import PackedImages, PackedTokens
from navit.config import ModelConfig, VisionConfig
from navit.kernels.splash_blocks import LANES
from navit.model import rotary
from navit.model.attention import attention_qkvpacked, prepared
from navit.model.block import BlockOptions
from navit.model.encoder import Encoder
from navit.model.heads import MapHead, max_pool, mean_pool, membership
from navit.model.layers import compute_dtype, linear, make_norm
from navit.model.patch import embedded, normalized
from navit.model.positions import PositionEmbedding
from navit.model.windows import most_windows, window_ids
from navit.sharding import Rules, platform


class VisionOutput(NamedTuple):
    """What the image tower returns.

    Attributes:
      packed: the tokens after the final norm, with their images' layout.
      pooled: in float32, before normalisation; 0 for an empty slot. None with
        pool="none".
      logits: class logits in float32; None without classes.
    """

    packed: PackedTokens
    pooled: Float[Array, "b s e"] | None
    logits: Float[Array, "b s c"] | None

    @property
    def tokens(self) -> Float[Array, "b n d"]:
        return self.packed.tokens


class Vision(nnx.Module):
    """Patch embedding, position embedding, encoder, pooling per segment.

    Padding never reaches an image, in value or gradient: `__call__` sets it to 0 before
    and after the encoder, attention sees only tokens with the same segment id, and a
    head pools only the tokens of its slot (`membership`).

    A `VisionConfig` is taken as a `ModelConfig` with defaults for all other fields. The
    weights are random, from `rngs` or else from seed 0.
    """

    def __init__(
        self,
        config: ModelConfig | VisionConfig,
        rules: Rules = Rules(),
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        if isinstance(config, VisionConfig):
            config = ModelConfig(vision=config)
        c = config.vision
        self.config, self.rules = c, rules
        self.implementation = None if config.attention == "auto" else config.attention
        self.dtype, self.fused = compute_dtype(config.dtype), config.fused
        shared = dict(use_bias=c.use_bias, dtype=self.dtype, rules=rules, rngs=rngs)
        bias = c.use_bias if c.patch_bias is None else c.patch_bias
        self.patch = linear(
            c.patch_frames * c.patch_size**2 * 3,
            c.width,
            names=(None, "embed"),
            **{**shared, "use_bias": bias},
        )
        self.position = (
            PositionEmbedding(c.position, c.width, rngs=rngs)
            if c.position.kind != "none"
            else None
        )
        self.encoder = Encoder(
            config,
            BlockOptions(
                c.width,
                c.mlp_dim,
                c.num_heads,
                qk_norm=c.qk_norm,
                use_bias=c.use_bias,
                norm=c.norm,
                eps=c.eps,
                act=c.act,
                gated=c.gated,
                layer_scale=c.layer_scale,
                learned_theta=rotary.learned_theta(c.rotary),
            ),
            depth=c.depth,
            final_norm=c.final_norm,
            rules=rules,
            rngs=rngs,
        )
        # Each is assigned once: NNX decides at the first assignment whether an
        # attribute holds parameters.
        self.head = (
            MapHead(c.width, c.mlp_dim, c.num_heads, **shared)
            if c.pool == "map"
            else None
        )
        self.projection = (
            linear(c.width, c.embed_dim, names=("embed", None), **shared)
            if c.embed_dim is not None
            else None
        )
        self.classifier = (
            linear(
                c.embed_dim or c.width, c.num_classes, names=("embed", None), **shared
            )
            if c.num_classes
            else None
        )
        norm = functools.partial(
            make_norm,
            c.norm,
            c.width,
            eps=c.eps,
            use_bias=c.use_bias,
            dtype=self.dtype,
            rngs=rngs,
        )
        self.pre_norm = norm() if c.pre_norm else None
        self.pool_norm = norm() if c.pool_norm else None
        self.registers = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.registers, c.width)))
            if c.registers
            else None
        )

    @jax.named_scope("vision")
    def __call__(
        self, packed: PackedImages, *, max_image_tokens: int | None = None
    ) -> VisionOutput:
        """Encodes packed images.

        Args:
          packed: images whose `patches` are uint8, or float and already normalised
            (with the default mean and std, to [-1, 1]).
          max_image_tokens: the most tokens that any of these images has, which lets
            attention choose a cheaper implementation. Pass the plan's token budget,
            never a guess.

        Raises:
          TypeError: if `packed` is not a PackedImages.
          ValueError: if the patch size differs from the model's; or, outside jit, if a
            grid exceeds the position table or an image has more than `max_image_tokens`
            tokens.
        """
        if not isinstance(packed, PackedImages):
            raise TypeError(
                f"expected PackedImages, not a {type(packed).__name__}: pass "
                "navit.pack(images)"
            )
        p, channels = self.config.patch_size, np.shape(packed.patches)[-1]
        frames = self.config.patch_frames
        if channels not in (p**2 * 3, frames * p**2 * 3):
            side, pair = (channels / 3) ** 0.5, (channels / 6) ** 0.5
            if frames == 1 and pair == p:
                raise ValueError(
                    "each patch has two frames, and this model takes one: pack the "
                    "clip with frames_per_patch=1"
                )
            if pair.is_integer():  # of a clip
                side = pair
            raise ValueError(
                f"the patches are {side:g}x{side:g} pixels, but this model takes "
                f"{p}x{p}: pack the images with patch_size={p}"
            )
        if not isinstance(packed.grids, jax.core.Tracer):
            self.config.position.check(np.asarray(packed.grids)[..., -2:])
            longest = np.asarray(packed.grids).prod(-1).max(initial=0)
            if max_image_tokens is not None and longest > max_image_tokens:
                raise ValueError(
                    f"an image has {longest} tokens, more than "
                    f"max_image_tokens={max_image_tokens}"
                )
        patches, segment_ids, coords, grids = (jnp.asarray(x) for x in packed)
        slots = grids.shape[1]
        real = (segment_ids > 0)[..., None]

        coords = jnp.where(real, coords, 0)
        own = _own(grids[..., -2:], segment_ids)  # a clip's time has no position here
        with jax.named_scope("embedding"):
            x = normalized(patches, real, self.config).astype(self.dtype)
            x = embedded(self.patch, x, frames).astype(jnp.float32)
            if self.position is not None:
                x = x + self.position(coords[..., -2:], own)
        x = self._blocks(x, segment_ids, coords, grids, own, max_image_tokens)
        x = jnp.where(real, x, jnp.zeros((), x.dtype))
        tokens = PackedTokens(x, segment_ids, coords, grids)
        if self.config.pool == "none":
            return VisionOutput(tokens, None, None)

        member = membership(segment_ids, slots)
        if self.head is not None:
            with jax.named_scope("head"):
                pooled = self.head(x, member)
        else:
            pool = mean_pool if self.config.pool == "mean" else max_pool
            pooled = pool(x, member)
        if self.pool_norm is not None:
            pooled = self.pool_norm(pooled)
        if self.projection is not None:
            pooled = self.projection(pooled)
        filled = (grids[..., :1] > 0).astype(jnp.float32)
        pooled = pooled.astype(jnp.float32) * filled
        logits = None
        if self.classifier is not None:
            logits = self.classifier(pooled).astype(jnp.float32)
        return VisionOutput(tokens, pooled, logits)

    def _blocks(
        self,
        x: Float[Array, "b n d"],
        segment_ids: Int[Array, "b n"],
        coords: Int[Array, "b n a"],
        grids: Int[Array, "b s a"],
        own: Int[Array, "b n 2"],
        longest: int | None,
    ) -> Float[Array, "b n d"]:
        """The encoder, with registers beside the patches for as long as it runs.

        Args:
          own: the grid of each token's image.
          longest: the most tokens that any image has.
        """
        c, (slots, n) = self.config, (grids.shape[1], x.shape[1])
        ids = segment_ids
        if self.registers is not None:
            x, ids = _with_registers(x, ids, grids, self.registers[...])
            longest = None if longest is None else longest + c.registers
        rotation = None
        if c.rotary is not None:
            heads = c.num_heads // self.rules.size("tensor")
            rotation = rotary.rotation(
                c.rotary,
                coords[..., -2:],
                own,
                c.width // c.num_heads,
                unturned=x.shape[1] - n,
                kernel_heads=heads if self.fused else 0,
            )
        if self.pre_norm is not None:
            x = self.pre_norm(x.astype(self.dtype))
        x = jnp.where((ids > 0)[..., None], x, 0.0)
        segments, attend = prepared(ids), attention_qkvpacked
        if not c.window:
            attend = functools.partial(
                attention_qkvpacked,
                segment_ids=segments,
                implementation=self.implementation,
                max_segments=slots,
                max_segment_tokens=longest,
            )
            return self.encoder(x, attend, rotation=rotation)[:, :n]
        if grids.shape[-1] != 2:
            raise ValueError(
                "windows are of single frames: pack the video with together=False"
            )
        windows = prepared(window_ids(segment_ids, coords, grids, c.window))
        # One program for both kinds of block, so the bounds are those of both: far more
        # segments than a row has, which only "unpack" needs, and which would slow it.
        bounds: dict[str, int | None] = {}
        if self.implementation == "unpack":
            bounds["max_segments"] = most_windows(n, slots, c.window)
            bounds["max_segment_tokens"] = longest

        def attend_within(qkv, *, width, full):  # type: ignore[no-untyped-def]
            ids = jax.tree.map(lambda a, b: jnp.where(full, a, b), segments, windows)
            return attention_qkvpacked(
                qkv, ids, width=width, implementation=self.implementation, **bounds
            )

        full = np.isin(np.arange(c.depth), c.full_blocks)
        return self.encoder(x, attend_within, rotation=rotation, full=full)

    def pooling_weights(self, packed: PackedTokens) -> Float[Array, "b n h"]:
        """How much each head of the pooling takes from each token, in float32.

        Those of an image sum to 1; padding has 0. `navit.unpack` makes a map of each
        image, `[rows, columns, h]`.

        Args:
          packed: tokens that this tower returned, `out.packed`.

        Raises:
          ValueError: if the tower does not pool by attention.
        """
        if self.head is None:
            raise ValueError(
                f'pool="{self.config.pool}" has no pooling weights: only pool="map" has'
            )
        member = membership(packed.segment_ids, packed.grids.shape[1])
        return self.head.weights(packed.tokens, member)


def _with_registers(
    x: Float[Array, "b n d"],
    segment_ids: Int[Array, "b n"],
    grids: Int[Array, "b s a"],
    registers: Float[Array, "r d"],
) -> tuple[Float[Array, "b m d"], Int[Array, "b m"]]:
    """Rows with the registers of every filled slot after their `n` tokens.

    There are `m = n + s * r` tokens, rounded up to what a TPU's kernels take.
    """
    b, s, r = *grids.shape[:2], len(registers)
    filled = grids[..., 0] > 0
    ids = jnp.where(filled, jnp.arange(1, s + 1, dtype=segment_ids.dtype)[None], 0)
    ids = jnp.concatenate([segment_ids, jnp.repeat(ids, r, axis=1)], 1)
    own = jnp.where(filled[..., None, None], registers[None, None], 0.0)
    x = jnp.concatenate([x, own.reshape(b, s * r, -1)], 1)
    more = -ids.shape[1] % LANES if platform() == "tpu" else 0
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(ids, ((0, 0), (0, more)))


def _own(
    grids: Int[Array, "b s 2"], segment_ids: Int[Array, "b n"]
) -> Int[Array, "b n 2"]:
    """The grid of each token's image; 1x1 at padding."""
    slot = jnp.maximum(segment_ids - 1, 0)[..., None]
    own = jnp.take_along_axis(grids, slot, axis=1)
    return jnp.where((segment_ids > 0)[..., None], own, 1)
