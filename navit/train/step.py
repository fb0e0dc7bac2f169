"""One training step: a packed batch in, a new state and a few numbers out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from navit import losses
from navit.batch import Batch
from navit.config import Config
from navit.model.two_tower import TwoTower, normalize
from navit.sharding import Rules
from navit.train.state import TrainState

Metrics = dict[str, Array]


def batch_loss(
    model: TwoTower, batch: Batch, config: Config, rules: Rules = Rules()
) -> Array:
    """The configured loss of a batch; empty slots count for nothing."""
    # What is frozen needs no backward pass.
    vision, text = model.vision, model.text
    if config.optim.vision_lr == 0:
        vision = jax.lax.stop_gradient(vision)
    if config.optim.text_lr == 0:
        text = jax.lax.stop_gradient(text)
    most = config.data.most_tokens(config.model.vision.patch_size)
    out = vision(batch.images, max_image_tokens=most)
    if config.train.loss == "classification":
        assert out.logits is not None
        real = (batch.images.grids[..., 0] > 0).reshape(-1)
        logits = out.logits.reshape(real.size, -1)
        return losses.classification_loss(logits, batch.label.reshape(-1), real)
    assert out.pooled is not None and text is not None
    assert model.scale is not None and model.bias is not None
    pooled, real = with_captions(out.pooled, batch, rules)
    images = normalize(pooled)
    texts = normalize(text(batch.text.reshape(real.size, -1)))
    scale, bias = model.scale[...], model.bias[...]
    if config.train.loss == "softmax":
        return losses.softmax_loss(images, texts, real, scale=scale, rules=rules)
    return losses.sigmoid_loss(
        *(images, texts, real),
        scale=scale,
        bias=bias,
        rules=rules,
        implementation=config.train.loss_implementation,
    )


def with_captions(
    pooled: Float[Array, "b s e"], batch: Batch, rules: Rules = Rules()
) -> tuple[Float[Array, "m e"], Bool[Array, " m"]]:
    """The images of `batch.text`, caption by caption, and which are there.

    No row leaves its device.
    """
    groups, places, _ = batch.text.shape
    real = batch.images.grids[..., 0] > 0
    if (groups, places) == real.shape:
        return pooled.reshape(-1, pooled.shape[-1]), real.reshape(-1)

    def grouped(x: Array) -> Array:
        x = x.reshape(-1, *x.shape[2:])
        return x.reshape(groups, -1, *x.shape[1:], out_sharding=rules("batch"))

    planned = grouped(batch.id >= 0)
    place = jnp.where(planned, jnp.cumsum(planned, 1) - 1, -1)
    # A product with ones and zeros, as its gradient is one too and no scatter.
    chosen = place[:, None, :] == jnp.arange(places)[:, None]
    there = (chosen & grouped(real)[:, None, :]).any(-1)
    highest = jax.lax.Precision.HIGHEST
    ones = chosen.astype(pooled.dtype)
    pooled = jnp.einsum("gcs,gse->gce", ones, grouped(pooled), precision=highest)
    return pooled.reshape(-1, pooled.shape[-1]), there.reshape(-1)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, rules: Rules
) -> Any:
    """`jax.jit` of (state, batch) -> (state, metrics); it consumes the state."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(batch_loss)(state.model, batch, config, rules)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if model.scale is not None:
            metrics["scale"] = jnp.exp(model.scale[...])
        if model.bias is not None and config.train.loss == "sigmoid":
            metrics["bias"] = model.bias[...]
        return TrainState(state.step + 1, model, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
