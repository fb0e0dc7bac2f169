"""One training step: a packed batch in, a new state and a few numbers out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from navit.batch import Batch, PackedImages
from navit.config import Config, OptimConfig, Sigmoid
from navit.losses.parts import Classes, Pairs, weighted_sum
from navit.model.two_tower import TwoTower, normalize
from navit.sharding import Rules
from navit.train.state import TrainState

Metrics = dict[str, Array]


def batch_loss(
    model: TwoTower, batch: Batch, config: Config, rules: Rules = Rules()
) -> tuple[Array, Metrics]:
    """The configured loss of a batch, and each of its parts by name.

    Empty slots do not count.
    """
    # A frozen tower needs no backward pass.
    vision, text = model.vision, model.text
    if config.optim.vision_lr == 0:
        vision = jax.lax.stop_gradient(vision)
    if config.optim.text_lr == 0:
        text = jax.lax.stop_gradient(text)
    most = config.data.most_tokens(config.model.vision.patch_size)
    count = config.train.microbatches
    in_parts = functools.partial(by_microbatch, count=count, rules=rules)
    classifies = config.train.needs("classifier")
    compares = config.train.needs("text_tower")

    def encode(images: PackedImages) -> tuple[Array | None, Array | None]:
        out = vision(images, max_image_tokens=most)
        return out.pooled if compares else None, out.logits if classifies else None

    def embed_texts(ids: Array) -> Array:
        assert text is not None
        out = text(ids.reshape(-1, ids.shape[-1], out_sharding=rules.rows(2)))
        return out.reshape(*ids.shape[:2], -1, out_sharding=rules.rows(3))

    pooled, logits = in_parts(encode, batch.images)
    classes = pairs = None
    if classifies:
        label, filled = batch.label, batch.images.grids[..., 0] > 0
        if config.data.strategy is not None:  # an image may have several slots
            logits, filled = by_owner(logits, batch, rules)
            label = owners_label(batch, rules)
        logits = logits.reshape(filled.size, -1)
        classes = Classes(logits, label.reshape(-1), filled.reshape(-1))
    if compares:
        assert model.scale is not None and model.bias is not None
        pooled, real = by_owner(pooled, batch, rules)
        # Every part of the text gathers the vocabulary table, so there are as few as
        # possible, each with at most as many tokens as a part of the images.
        needed = -(-count * batch.text.size // batch.images.segment_ids.size)
        text_count = next(
            x for x in range(1, count + 1) if count % x == 0 and x >= min(needed, count)
        )
        texts = in_parts(embed_texts, batch.text, count=text_count)
        texts = texts.reshape(real.size, -1, out_sharding=rules.rows(2))
        pairs = Pairs(
            normalize(pooled),
            normalize(texts),
            real,
            scale=model.scale[...],
            bias=model.bias[...],
        )
    return weighted_sum(config.train.losses, pairs=pairs, classes=classes, rules=rules)


def by_microbatch(
    f: Callable[[Any], Any], rows: Any, *, count: int, rules: Rules
) -> Any:
    """Applies `f` to one share of each device's rows at a time.

    Each share's activations are recomputed in its backward pass, so memory holds those
    of one share at a time, and the loss still sees all rows (GradCache, arXiv
    2101.06983; open_clip's --accum-freq).

    Args:
      f: arrays `[b, ...]` -> arrays `[b, ...]`.
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

    def join(x: Array) -> Array:  # [count, b / count, ...] -> [b, ...]
        shape, sharding = x.shape, rules(None, "batch")
        x = x.reshape(count, devices, -1, *shape[2:], out_sharding=sharding)
        x = x.swapaxes(0, 1)
        return x.reshape(-1, *shape[2:], out_sharding=rules("batch"))

    def share(_: None, x: Any) -> tuple[None, Any]:
        return None, jax.checkpoint(f, prevent_cse=False)(x)

    _, out = jax.lax.scan(share, None, jax.tree.map(split, rows))
    return jax.tree.map(join, out)


def by_owner(
    values: Float[Array, "b s e"], batch: Batch, rules: Rules = Rules()
) -> tuple[Float[Array, "m e"], Bool[Array, " m"]]:
    """Aligns images with captions: text i of the loss belongs to image i.

    Args:
      values: of each slot, such as its pooled vector.

    Returns:
      For each of the `m = g * c` captions in `batch.text`, its image's value, and
      whether it has an image; `batch.owner` tells which slots have which caption. The
      value of an image with several views is their mean, each weighted by its tokens.
      No row leaves its device.
    """
    chosen, tokens = _chosen(batch, rules)
    own = jnp.where(chosen, tokens[:, None, :], 0.0)
    total = own.sum(-1, keepdims=True)
    # The only slot of a caption has the weight 1, however a device divides.
    weights = jnp.where(own == total, 1.0, own / jnp.maximum(total, 1.0))
    weights = jnp.where(own > 0, weights, 0.0)
    # A product with a matrix: its gradient is a product too, not a scatter.
    highest = jax.lax.Precision.HIGHEST
    values = _grouped(values, batch, rules)
    values = jnp.einsum(
        "gcs,gse->gce", weights.astype(values.dtype), values, precision=highest
    )
    return values.reshape(-1, values.shape[-1]), total.reshape(-1) > 0


def owners_label(batch: Batch, rules: Rules = Rules()) -> Int[Array, " m"]:
    """The label of each caption's image; -1 = none."""
    chosen, _ = _chosen(batch, rules)
    label = _grouped(batch.label, batch, rules)[:, None, :]
    return jnp.where(chosen, label, -1).max(-1).reshape(-1)


def _chosen(
    batch: Batch, rules: Rules
) -> tuple[Bool[Array, "g c s"], Float[Array, "g s"]]:
    """Which slots of a group have which caption, and each slot's tokens."""
    places = jnp.arange(batch.text.shape[1])
    owner = _grouped(batch.owner, batch, rules)
    tokens = _grouped(batch.images.grids.prod(-1), batch, rules)
    return owner[:, None, :] == places[None, :, None], tokens.astype(jnp.float32)


def _grouped(x: Array, batch: Batch, rules: Rules) -> Array:
    """`[b, s, ...]` -> `[g, slots of the group, ...]`."""
    groups = batch.text.shape[0]
    x = x.reshape(-1, *x.shape[2:])
    return x.reshape(groups, -1, *x.shape[1:], out_sharding=rules("batch"))


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, rules: Rules
) -> Any:
    """The jitted step (state, batch) -> (state, metrics); it donates the state.

    An update that is not finite changes nothing but the counters. Beyond
    `config.train.skips` of these, no step changes anything: the state stays the one
    before that update, for the host to save when it hears of it.
    """

    losses = config.train.losses
    has_bias = any(isinstance(part, Sigmoid) for part in losses)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
        (loss, parts), grads = value_and_grad(state.model, batch, config, rules)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
            ema = state.ema
            if ema is not None:
                ema = _averaged(ema, model, config.optim, state.step)
            stopped = state.skipped > config.train.skips
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            skipped = state.skipped + (~finite & ~stopped).astype(jnp.int32)
            stops = skipped > config.train.skips
            new = TrainState(state.step + 1, model, opt_state, skipped, ema)
            new = jax.tree.map(
                functools.partial(jnp.where, finite & ~stops), new, state
            )
            step = jnp.where(stops, state.step, state.step + 1)
            new = new._replace(step=step, skipped=skipped)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        if len(losses) > 1:
            metrics |= {f"loss_{name}": value for name, value in parts.items()}
        if new.model.scale is not None:
            metrics["scale"] = jnp.exp(new.model.scale[...])
        if new.model.bias is not None and has_bias:
            metrics["bias"] = new.model.bias[...]
        return new, metrics

    return jax.jit(train_step, donate_argnums=0)


def _averaged(
    ema: TwoTower, model: TwoTower, config: OptimConfig, step: Array
) -> TwoTower:
    """The moving average after a step; early on, with less of what came before.

    The decay after `t` steps is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage with `num_updates`.
    """
    assert config.ema is not None
    t = step.astype(jnp.float32) + 1
    rest = 1 - jnp.minimum(config.ema, (1 + t) / (10 + t))
    # In this form, what does not change stays as it is, to the bit.
    return jax.tree.map(lambda a, p: a + rest * (p - a), ema, model)
