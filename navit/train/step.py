"""One training step: a packed batch in, a new state and a few numbers out."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

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
    real = (batch.images.grids[..., 0] > 0).reshape(-1)
    if config.train.loss == "classification":
        assert out.logits is not None
        logits = out.logits.reshape(real.size, -1)
        return losses.classification_loss(logits, batch.label.reshape(-1), real)
    assert out.pooled is not None and text is not None
    assert model.scale is not None and model.bias is not None
    images = normalize(out.pooled.reshape(real.size, -1))
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


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, rules: Rules
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step; it consumes the state that it is given."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(batch_loss)(state.model, batch, config, rules)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if model.scale is not None:
            metrics["scale"] = jnp.exp(model.scale[...])
        if model.bias is not None and config.train.loss == "sigmoid":
            metrics["bias"] = model.bias[...]
        return TrainState(state.step + 1, model, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
