"""Losses over real images: empty slots count in no row, no column and no mean.

All take global arrays. Under a mesh the image rows stay on their devices and the texts
come to them: gathered, once, or around a ring.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from navit.sharding import Axes, Rules

# Up to so many bytes of texts are gathered on every device, twice that with their
# gradient; the least of TPUs has 16 GiB. A ring has as many hops as there are devices,
# one after the other, each of little work.
_GATHERED = 256 * 2**20

# Pairs of which logits and gradients are held at a time: 16 MiB each.
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
    """Every image against every text, each pair on its own (SigLIP, arXiv 2303.15343).

    Args:
      images, texts: unit vectors, matching pair by pair.
      real: False where there is no pair.
      scale, bias: t' and b; a logit is exp(t') * similarity + b.
      implementation: "gather" brings all texts to every device, "ring" passes them on
        from device to device; both hold a few million pairs at a time, and make value
        and gradients in one pass. "auto" gathers up to 256 MiB of texts. "dense" holds
        all pairs of a device's images, and is what the others are held against.

    Returns:
      The sum over real pairs divided by the number of real images; 0 with none.
    """
    if implementation == "dense":
        both = real[:, None] & rules.replicate(real)[None, :]
        everywhere = rules.replicate(texts)
        match = _diagonal((len(images), len(texts)), rules)
        total = _terms(images, everywhere, scale, bias, both, match)
    else:
        small = texts.size * texts.dtype.itemsize <= _GATHERED
        ring = implementation == "ring" or (implementation == "auto" and not small)
        total = _total(images, texts, scale, bias, real, rules, ring)
    return total / jnp.maximum(real.sum(), 1)


@jax.named_scope("loss")
def softmax_loss(
    images: Float[Array, "m e"],
    texts: Float[Array, "m e"],
    real: Bool[Array, " m"],
    *,
    scale: Float[Array, ""],
    rules: Rules = Rules(),
) -> Float[Array, ""]:
    """CLIP's loss: the right text for an image and the right image for a text.

    The mean of both directions, each over the real images; arguments as in
    `sigmoid_loss`. A bias would cancel, so there is none.
    """
    logits = _similarities(images, rules.replicate(texts)) * jnp.exp(scale)
    everywhere = rules.replicate(real)
    # Empty rows keep one finite entry, so that no logsumexp is over nothing.
    kept = (real[:, None] & everywhere[None, :]) | _diagonal(logits.shape, rules)
    logits = jnp.where(kept, logits, -jnp.inf)
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
    """-log sigmoid(+-logit), summed over the pairs of which both are real."""
    logits = _similarities(images, texts) * jnp.exp(scale) + bias
    signed = jnp.where(match, logits, -logits)
    return -jnp.where(both, jax.nn.log_sigmoid(signed), 0.0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _total(
    images: Array,
    texts: Array,
    scale: Array,
    bias: Array,
    real: Array,
    rules: Rules,
    ring: bool,
) -> Array:
    """`_terms` of all images and all texts.

    The gradients come with the value, as each of its parts is at hand only once: with
    reverse mode a ring would keep all texts that passed, and the logits would be made
    twice.
    """
    return _with_gradients(images, texts, scale, bias, real, rules, ring)[0]


def _backward(rules, ring, gradients, above):  # type: ignore[no-untyped-def]
    del rules, ring
    return (*(above * gradient for gradient in gradients), None)


def _with_gradients(
    images: Array,
    texts: Array,
    scale: Array,
    bias: Array,
    real: Array,
    rules: Rules,
    ring: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """The sum, and its gradients by images, texts, scale and bias."""
    rows, one = rules("batch"), rules()
    if rows is None:
        return _columns(images, texts, scale, bias, real, real, 0, None)
    axes = rules.batch
    local = functools.partial(_in_a_ring if ring else _gathered, axes=axes)
    return jax.shard_map(
        local,
        in_specs=(rows, rows, one, one, rows),
        out_specs=(one, (rows, rows, one, one)),
    )(images, texts, scale, bias, real)


_total.defvjp(_with_gradients, _backward)


def _gathered(images, texts, scale, bias, real, *, axes):  # type: ignore[no-untyped-def]
    """On one device: its images and the texts of all."""
    everything = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
    value, (d_images, d_texts, *rest) = _columns(
        images,
        everything(texts),
        *_varying((scale, bias), axes),
        *(real, everything(real)),
        *(jax.lax.axis_index(axes) * len(images), axes),
    )
    d_texts = jax.lax.psum_scatter(d_texts, axes, tiled=True)
    value, d_scale, d_bias = jax.lax.psum((value, *rest), axes)
    return value, (d_images, d_texts, d_scale, d_bias)


def _in_a_ring(images, texts, scale, bias, real, *, axes):  # type: ignore[no-untyped-def]
    """On one device: its images, and the texts of one device after another.

    The texts travel with what is known of their gradient, and are home in the end.
    """
    count, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    scale, bias = _varying((scale, bias), axes)
    ahead = [(i, (i + 1) % count) for i in range(count)]

    def hop(carry, hops):  # type: ignore[no-untyped-def]
        here, sums = carry
        texts, others_real, d_texts = here
        owner = (me - hops) % count
        value, (d_images, d_more, *rest) = _columns(
            *(images, texts, scale, bias, real, others_real),
            *((me - owner) * len(images), axes),
        )
        sums = jax.tree.map(jnp.add, sums, (value, d_images, *rest))
        here = jax.lax.ppermute((texts, others_real, d_texts + d_more), axes, ahead)
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
    """The sum over these images and texts and its gradients, some texts at a time.

    Args:
      shift: text i + shift belongs to image i.
      axes: the mesh axes that what is given varies over.
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
    """Marks what is alike on all devices as each device's own."""
    if axes is None:
        return values

    def mark(x: Array) -> Array:
        return jax.lax.pcast(x, axes, to="varying")

    return tuple(map(mark, values))
