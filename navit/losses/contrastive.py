"""Contrastive losses over real images; empty slots count in no row, column or mean.

All losses take global arrays. Under a mesh, images stay on their devices and texts are
brought to them, gathered all at once or passed around a ring.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from navit.sharding import Axes, Rules

# The most bytes of texts to gather on every device; their gradient takes as much again.
# The smallest TPU has 16 GiB. A ring takes one hop per device, in sequence, each with
# little work.
_GATHERED = 256 * 2**20

# Pairs whose logits and gradients are in memory at a time: 16 MiB each.
_PAIRS = 2**22


@jax.named_scope("loss")
def sigmoid_loss(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    real: Bool[Array, " m"],
    *,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    rules: Rules = Rules(),
    implementation: Literal["auto", "dense", "gather", "ring"] = "auto",
) -> Float[Array, ""]:
    """Every image against every text, each pair independently.

    From SigLIP, arXiv 2303.15343.

    Args:
      images, texts: unit vectors; text i belongs to image i (aligned by
        `by_owner` in navit/train/step.py).
      real: False where i is an empty slot, without an image or a text.
      scale, bias: t' and b; a logit is exp(t') * similarity + b.
      implementation: "gather" brings all texts to every device, and "ring" passes them
        from device to device. Both keep a few million pairs in memory at a time and
        compute value and gradients in one pass. "auto" gathers up to 256 MiB of texts
        and uses a ring for more. "dense" keeps all pairs of a device's images and is
        the reference for the others.

    Returns:
      The sum over each real image with each real text, divided by the number of real
      images; 0 if there are none.
    """
    if implementation == "dense":
        both = real[:, None] & rules.replicate(real)[None, :]
        everywhere = rules.replicate(texts)
        match = _diagonal((len(images), len(texts)), rules)
        total = _terms(images, everywhere, scale, bias, both, match)
    else:
        ring = uses_ring(texts, implementation)
        total = _total(images, texts, scale, bias, real, rules, ring)
    return total / jnp.maximum(real.sum(), 1)


def uses_ring(texts: Array | jax.ShapeDtypeStruct, implementation: str) -> bool:
    """Whether several devices pass texts `[m, e]` around, rather than gather them."""
    small = texts.size * texts.dtype.itemsize <= _GATHERED
    return implementation == "ring" or (implementation == "auto" and not small)


@jax.named_scope("loss")
def softmax_loss(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    real: Bool[Array, " m"],
    *,
    scale: Float[Array, ""],
    rules: Rules = Rules(),
) -> Float[Array, ""]:
    """CLIP's loss: the right text for each image and the right image for each text.

    The mean of both directions, each over the real images. Arguments are those of
    `sigmoid_loss`, except for a bias, which would cancel out.
    """
    logits = _similarities(images, rules.replicate(texts)) * jnp.exp(scale)
    everywhere = rules.replicate(real)
    # The diagonal stays visible, so that logsumexp of an empty row is finite.
    visible = (real[:, None] & everywhere[None, :]) | _diagonal(logits.shape, rules)
    logits = jnp.where(visible, logits, -jnp.inf)
    right = (images * texts).sum(-1) * jnp.exp(scale)
    to_text = jnp.where(real, jax.nn.logsumexp(logits, 1) - right, 0.0)
    to_image = jnp.where(everywhere, jax.nn.logsumexp(logits, 0), 0.0)
    total = to_text.sum() + to_image.sum() - jnp.where(real, right, 0.0).sum()
    return total / 2 / jnp.maximum(real.sum(), 1)


def _similarities(
    images: Float[Array, "m e"], texts: Float[Array, "c e"]
) -> Float[Array, "m c"]:
    return jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)


def _diagonal(shape: tuple[int, ...], rules: Rules) -> Bool[Array, "m m"]:
    def index(axis: int) -> Array:
        return jax.lax.broadcasted_iota(
            jnp.int32, shape, axis, out_sharding=rules("batch", None)
        )

    return index(0) == index(1)


def _terms(
    images: Float[Array, "m e"],
    texts: Float[Array, "c e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    both: Bool[Array, "m c"],
    match: Bool[Array, "m c"],
) -> Float[Array, ""]:
    """-log sigmoid(+-logit), summed over pairs of a real image and a real text.

    Args:
      both: whether image and text are real.
      match: whether the text belongs to the image.
    """
    logits = _similarities(images, texts) * jnp.exp(scale) + bias
    signed = jnp.where(match, logits, -logits)
    return -jnp.where(both, jax.nn.log_sigmoid(signed), 0.0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _total(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    real: Bool[Array, " m"],
    rules: Rules,
    ring: bool,
) -> Float[Array, ""]:
    """`_terms` of all images and all texts.

    Gradients are computed together with the value. In reverse mode, a ring would keep
    all texts that passed by, and the logits would be computed twice.
    """
    return _with_gradients(images, texts, scale, bias, real, rules, ring)[0]


def _backward(rules, ring, gradients, above):  # type: ignore[no-untyped-def]
    del rules, ring
    return (*[above * gradient for gradient in gradients], None)


def _with_gradients(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    real: Bool[Array, " m"],
    rules: Rules,
    ring: bool,
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    """The sum, and its gradients by images, texts, scale and bias."""
    rows, replicated = rules("batch"), rules()
    if rows is None:
        return _columns(images, texts, scale, bias, real, real, 0, None)
    axes = rules.batch
    local = functools.partial(_in_a_ring if ring else _gathered, axes=axes)
    return jax.shard_map(
        local,
        in_specs=(rows, rows, replicated, replicated, rows),
        out_specs=(replicated, (rows, rows, replicated, replicated)),
    )(images, texts, scale, bias, real)


_total.defvjp(_with_gradients, _backward)


def _gathered(images, texts, scale, bias, real, *, axes):  # type: ignore[no-untyped-def]
    """On one device: its own images with the texts of all devices."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
    scale, bias = _varying((scale, bias), axes)
    value, (d_images, d_texts, *rest) = _columns(
        images,
        gather(texts),
        scale,
        bias,
        real,
        gather(real),
        jax.lax.axis_index(axes) * len(images),
        axes,
    )
    d_texts = jax.lax.psum_scatter(d_texts, axes, tiled=True)
    value, d_scale, d_bias = jax.lax.psum((value, *rest), axes)
    return value, (d_images, d_texts, d_scale, d_bias)


def _in_a_ring(images, texts, scale, bias, real, *, axes):  # type: ignore[no-untyped-def]
    """On one device: its own images with the texts of one device after another.

    The texts travel together with their gradient so far, and end where they started.
    """
    count, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    scale, bias = _varying((scale, bias), axes)
    ahead = [(i, (i + 1) % count) for i in range(count)]

    def hop(carry, hops):  # type: ignore[no-untyped-def]
        here, sums = carry
        texts, texts_real, d_texts = here
        owner = (me - hops) % count
        value, (d_images, d_more, *rest) = _columns(
            images,
            texts,
            scale,
            bias,
            real,
            texts_real,
            (me - owner) * len(images),
            axes,
        )
        sums = jax.tree.map(jnp.add, sums, (value, d_images, *rest))
        here = jax.lax.ppermute((texts, texts_real, d_texts + d_more), axes, ahead)
        return (here, sums), None

    (zero,) = _varying((jnp.zeros(()),), axes)
    sums = zero, jnp.zeros_like(images), zero, zero
    start = (texts, real, jnp.zeros_like(texts)), sums
    (here, sums), _ = jax.lax.scan(hop, start, jnp.arange(count))
    value, d_images, *rest = sums
    value, d_scale, d_bias = jax.lax.psum((value, *rest), axes)
    return value, (d_images, here[2], d_scale, d_bias)


def _columns(
    images: Float[Array, "m e"],
    texts: Float[Array, "c e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    real: Bool[Array, " m"],
    texts_real: Bool[Array, " c"],
    shift: int | Array,
    axes: Axes,
) -> tuple[Array, tuple[Array, ...]]:
    """The sum over these images and texts with its gradients, some texts at a time.

    Args:
      shift: image i belongs to text i + shift, as the texts of one device meet the
        images of another.
      axes: the mesh axes over which the arguments vary.
    """
    value_and_gradients = jax.value_and_grad(_terms, argnums=(0, 1, 2, 3))
    rows = jnp.arange(len(images))[:, None] + shift

    def some(texts, texts_real, columns):  # type: ignore[no-untyped-def]
        both = real[:, None] & texts_real[None, :]
        match = rows == columns[None, :]
        return value_and_gradients(images, texts, scale, bias, both, match)

    count = len(texts)
    chunks = -(-count * len(images) // _PAIRS)
    columns = jnp.arange(count)
    if chunks <= 1:
        return some(texts, texts_real, columns)
    size = -(-count // chunks)
    chunks = -(-count // size)

    def split(x: Array) -> Array:
        over = chunks * size - count
        x = jnp.pad(x, [(0, over)] + [(0, 0)] * (x.ndim - 1)) if over else x
        return x.reshape(chunks, size, *x.shape[1:])

    def step(sums, chunk):  # type: ignore[no-untyped-def]
        value, (d_images, d_texts, *rest) = some(*chunk)
        return jax.tree.map(jnp.add, sums, (value, d_images, *rest)), d_texts

    (zero,) = _varying((jnp.zeros(()),), axes)
    start = zero, jnp.zeros_like(images), zero, zero
    parts = tuple(map(split, (texts, texts_real, columns)))
    sums, d_texts = jax.lax.scan(step, start, parts)
    value, d_images, d_scale, d_bias = sums
    d_texts = d_texts.reshape(-1, texts.shape[1])[:count]
    return value, (d_images, d_texts, d_scale, d_bias)


def _varying(values: tuple[Array, ...], axes: Axes) -> tuple[Array, ...]:
    """Marks replicated values as varying over devices."""
    if axes is None:
        return values

    def mark(x: Array) -> Array:
        return jax.lax.pcast(x, axes, to="varying")

    return tuple(map(mark, values))
