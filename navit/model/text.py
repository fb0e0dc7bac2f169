"""The text tower, like SigLIP 2's: no mask, and the last position is pooled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from navit.config import ModelConfig
from navit.kernels.splash_blocks import LANES
from navit.model.attention import attention_qkvpacked, prepared
from navit.model.block import BlockOptions
from navit.model.encoder import Encoder
from navit.model.layers import compute_dtype, linear
from navit.sharding import Rules, platform

# Tokens in a row of captions: just long enough to keep a TPU busy.
_ROW_TOKENS = 256


class Text(nnx.Module):
    """Token ids -> one vector per caption.

    Padding is attended to like any other token, because the released towers were
    trained that way. The last position is pooled, even if it is padding (big_vision,
    models/proj/image_text/text_transformer.py; transformers, models/siglip2).
    """

    def __init__(
        self, config: ModelConfig, rules: Rules = Rules(), *, rngs: nnx.Rngs
    ) -> None:
        c = config.text
        assert c is not None
        self.config, self.rules = c, rules
        self.dtype = compute_dtype(config.dtype)
        self.kernels = config.attention != "xla"
        init = jax.nn.initializers.normal(stddev=c.width**-0.5)
        self.embedding = nnx.Param(
            init(
                rngs.params(),
                (c.vocab_size, c.width),
                # Along the vocabulary, so that the gathered shards are contiguous.
                out_sharding=rules("embed", None)
                if c.vocab_size % rules.size("embed") == 0
                else rules(None, "embed"),
            )
        )
        self.position = nnx.Param(init(rngs.params(), (c.length, c.width)))
        self.encoder = Encoder(
            config,
            BlockOptions(c.width, c.mlp_dim, c.num_heads),
            depth=c.depth,
            rules=rules,
            rngs=rngs,
        )
        self.head = linear(
            c.width,
            config.vision.embed_dim or config.vision.width,
            names=("embed", None),
            use_bias=True,
            dtype=self.dtype,
            rules=rules,
            rngs=rngs,
        )

    @jax.named_scope("text")
    def __call__(
        self, token_ids: Int[Array | np.ndarray, "m t"]
    ) -> Float[Array, "m e"]:
        """Embeds captions in float32, before normalisation.

        Raises:
          ValueError: if the captions do not have exactly `config.length` tokens each.
        """
        token_ids = jnp.asarray(token_ids)
        if token_ids.shape[-1] != self.config.length:
            raise ValueError(
                f"token_ids {token_ids.shape} must have {self.config.length} tokens "
                "each: the last position is pooled, so pad to the trained length"
            )
        with jax.named_scope("embedding"):
            table = self.rules.gather(self.embedding[...], self.dtype)
            x = table.at[token_ids].get(out_sharding=self.rules("batch", None, None))
            x = x.astype(jnp.float32) + self.position[...][None]
        count, length = token_ids.shape
        beside = 0
        if self.kernels:
            beside = captions_beside(count // self.rules.size("batch"), length)
        segment_ids = None
        if beside:
            rows = (count // beside, beside * length)
            x = jax.lax.reshape(
                x, (*rows, x.shape[-1]), out_sharding=self.rules.rows(x.ndim)
            )
            segments = jnp.repeat(jnp.arange(1, beside + 1), length)
            segment_ids = prepared(jnp.broadcast_to(segments, rows))
        attend = functools.partial(attention_qkvpacked, segment_ids=segment_ids)
        x = self.encoder(x, attend)
        x = x[:, length - 1 :: length]  # the last position of each caption
        x = jax.lax.reshape(x, (count, x.shape[-1]), out_sharding=self.rules.rows(2))
        return self.head(x).astype(jnp.float32)


def captions_beside(count: int, length: int) -> int:
    """How many of a device's captions share a row of a TPU's attention kernel.

    0 on other platforms, or if no number of captions fits the kernel.
    """
    if platform() != "tpu":
        return 0
    most = max(1, _ROW_TOKENS // length)
    fit = (g for g in range(most, 0, -1) if count % g == 0 and g * length % LANES == 0)
    return next(fit, 0)
