"""The image tower: packed patches -> tokens, and one vector for every slot."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from navit.batch import PackedImages, PackedTokens
from navit.config import ModelConfig, VisionConfig
from navit.model.attention import attention_qkvpacked, prepared
from navit.model.encoder import Encoder
from navit.model.heads import MapHead, max_pool, mean_pool, membership
from navit.model.layers import compute_dtype, linear
from navit.model.positions import PositionEmbedding
from navit.sharding import Rules


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
        self.dtype = compute_dtype(config.dtype)
        shared = dict(use_bias=c.use_bias, dtype=self.dtype, rules=rules, rngs=rngs)
        self.patch = linear(
            c.patch_size**2 * 3, c.width, names=(None, "embed"), **shared
        )
        self.position = PositionEmbedding(c.position, c.width, rngs=rngs)
        self.encoder = Encoder(
            config,
            width=c.width,
            depth=c.depth,
            mlp_dim=c.mlp_dim,
            num_heads=c.num_heads,
            qk_norm=c.qk_norm,
            use_bias=c.use_bias,
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

    @jax.named_scope("vision")
    def __call__(
        self, packed: PackedImages, *, max_image_tokens: int | None = None
    ) -> VisionOutput:
        """Encodes packed images.

        Args:
          packed: images whose `patches` are uint8, or float and already normalised to
            [-1, 1].
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
        if channels != p**2 * 3:
            side = (channels / 3) ** 0.5
            raise ValueError(
                f"the patches are {side:g}x{side:g} pixels, but this model takes "
                f"{p}x{p}: pack the images with patch_size={p}"
            )
        if not isinstance(packed.grids, jax.core.Tracer):
            self.config.position.check(np.asarray(packed.grids))
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
        with jax.named_scope("embedding"):
            x = self.patch(_normalize(patches, real).astype(self.dtype))
            x = x.astype(jnp.float32) + self.position(coords, _own(grids, segment_ids))
        x = self.encoder(
            jnp.where(real, x, 0.0),
            functools.partial(
                attention_qkvpacked,
                segment_ids=prepared(segment_ids),
                implementation=self.implementation,
                max_segments=slots,
                max_segment_tokens=max_image_tokens,
            ),
        )
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
        if self.projection is not None:
            pooled = self.projection(pooled)
        filled = (grids[..., :1] > 0).astype(jnp.float32)
        pooled = pooled.astype(jnp.float32) * filled
        logits = None
        if self.classifier is not None:
            logits = self.classifier(pooled).astype(jnp.float32)
        return VisionOutput(tokens, pooled, logits)

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


def _normalize(
    patches: UInt8[Array, "b n c"] | Float[Array, "b n c"], real: Bool[Array, "b n 1"]
) -> Float[Array, "b n c"]:
    """Maps uint8 pixels to [-1, 1] in float32; padding becomes exactly 0."""
    if patches.dtype == jnp.uint8:
        patches = patches.astype(jnp.float32) / 127.5 - 1.0
    return jnp.where(real, patches.astype(jnp.float32), 0.0)


def _own(
    grids: Int[Array, "b s 2"], segment_ids: Int[Array, "b n"]
) -> Int[Array, "b n 2"]:
    """The grid of each token's image; 1x1 at padding."""
    slot = jnp.maximum(segment_ids - 1, 0)[..., None]
    own = jnp.take_along_axis(grids, slot, axis=1)
    return jnp.where((segment_ids > 0)[..., None], own, 1)
