"""One training step: a packed batch in, a new state and a few numbers out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from navit.batch import Batch, PackedImages
from navit.config import Config
from navit.losses.classification import classification_loss
from navit.losses.contrastive import sigmoid_loss, softmax_loss
from navit.model.two_tower import TwoTower, normalize
from navit.sharding import Rules
from navit.train.state import TrainState

Metrics = dict[str, Array]


def batch_loss(
    model: TwoTower, batch: Batch, config: Config, rules: Rules = Rules()
) -> Array:
    """The configured loss of a batch; empty slots do not count."""
    # A frozen tower needs no backward pass.
    vision, text = model.vision, model.text
    if config.optim.vision_lr == 0:
        vision = jax.lax.stop_gradient(vision)
    if config.optim.text_lr == 0:
        text = jax.lax.stop_gradient(text)
    most = config.data.most_tokens(config.model.vision.patch_size)
    count = config.train.microbatches
    in_parts = functools.partial(by_microbatch, count=count, rules=rules)
    if config.train.loss == "classification":

        def classify(images: PackedImages) -> Array:
            logits = vision(images, max_image_tokens=most).logits
            assert logits is not None
            return logits

        real = (batch.images.grids[..., 0] > 0).reshape(-1)
        logits = in_parts(classify, batch.images).reshape(real.size, -1)
        return classification_loss(logits, batch.label.reshape(-1), real)
    assert text is not None and model.scale is not None and model.bias is not None

    def embed_images(images: PackedImages) -> Array:
        pooled = vision(images, max_image_tokens=most).pooled
        assert pooled is not None
        return pooled

    def embed_texts(ids: Array) -> Array:
        out = text(ids.reshape(-1, ids.shape[-1], out_sharding=rules.rows(2)))
        return out.reshape(*ids.shape[:2], -1, out_sharding=rules.rows(3))

    pooled, real = with_captions(in_parts(embed_images, batch.images), batch, rules)
    images = normalize(pooled)
    # As few parts of text as keep each no longer than a part of images, because every
    # part gathers the vocabulary table.
    needed = -(-count * batch.text.size // batch.images.segment_ids.size)
    text_count = next(
        x for x in range(1, count + 1) if count % x == 0 and x >= min(needed, count)
    )
    texts = in_parts(embed_texts, batch.text, count=text_count)
    texts = normalize(texts.reshape(real.size, -1, out_sharding=rules.rows(2)))
    scale, bias = model.scale[...], model.bias[...]
    if config.train.loss == "softmax":
        return softmax_loss(images, texts, real, scale=scale, rules=rules)
    return sigmoid_loss(
        images,
        texts,
        real,
        scale=scale,
        bias=bias,
        rules=rules,
        implementation=config.train.loss_implementation,
    )


def by_microbatch(
    f: Callable[[Any], Array], rows: Any, *, count: int, rules: Rules
) -> Array:
    """Applies `f` to one share of each device's rows at a time.

    Each share's activations are recomputed in its backward pass, so memory holds those
    of one share at a time, and the loss still sees all rows (GradCache, arXiv
    2101.06983; open_clip's --accum-freq).

    Args:
      rows: arrays `[b, ...]`.
      count: the number of shares.
    """
    if count == 1:
        return f(rows)
    devices = rules.size("batch")

    def split(x: Array) -> Array:  # [b, ...] -> [count, b / count, ...]
        x = x.reshape(devices, count, -1, *x.shape[1:], out_sharding=rules("batch"))
        sharding = rules(None, "batch")
        return x.swapaxes(0, 1).reshape(count, -1, *x.shape[3:], out_sharding=sharding)

    def share(_: None, x: Any) -> tuple[None, Array]:
        return None, jax.checkpoint(f, prevent_cse=False)(x)

    _, out = jax.lax.scan(share, None, jax.tree.map(split, rows))
    shape, sharding = out.shape, rules(None, "batch")
    out = out.reshape(count, devices, -1, *shape[2:], out_sharding=sharding)
    out = out.swapaxes(0, 1)
    return out.reshape(-1, *shape[2:], out_sharding=rules("batch"))


def with_captions(
    pooled: Float[Array, "b s e"], batch: Batch, rules: Rules = Rules()
) -> tuple[Float[Array, "m e"], Bool[Array, " m"]]:
    """The image of each caption in `batch.text`, and whether it is real.

    There are `m = g * c` captions. No row leaves its device.
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
    # A product with a one-hot matrix: its gradient is a product too, not a scatter.
    chosen = place[:, None, :] == jnp.arange(places)[:, None]
    present = (chosen & grouped(real)[:, None, :]).any(-1)
    highest = jax.lax.Precision.HIGHEST
    ones = chosen.astype(pooled.dtype)
    pooled = jnp.einsum("gcs,gse->gce", ones, grouped(pooled), precision=highest)
    return pooled.reshape(-1, pooled.shape[-1]), present.reshape(-1)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, rules: Rules
) -> Any:
    """The jitted step (state, batch) -> (state, metrics); it donates the state."""

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
