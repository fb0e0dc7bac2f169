"""Random draws for every image of an epoch: order, token budget, crop, tokens kept.

numpy over whole blocks of images; each function is pure given its generator or key.
"""

from __future__ import annotations

import numpy as np

from navit.config import Crop, DataConfig, Sides, TokenDrop


def shuffled(positions: np.ndarray, count: int, key: list[int]) -> np.ndarray:
    """Where a random permutation of `range(count)` takes `positions`; both int64 `[m]`.

    No array of length `count` is made, so a block out of 10^9 images costs no more than
    its own length. A Feistel network over the next power of two is applied until the
    value is below `count` (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """
    bits = max(2, (count - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = np.random.default_rng(key).integers(0, 2**63, 6, np.uint64)

    def once(x: np.ndarray) -> np.ndarray:
        high, low = x >> low_bits, x & low_mask
        for i, round_key in enumerate(keys):
            if i % 2:
                low = low ^ (_mixed(high ^ round_key) & low_mask)
            else:
                high = high ^ (_mixed(low ^ round_key) & high_mask)
        return (high << low_bits) | low

    out = once(np.asarray(positions).astype(np.uint64))
    while (outside := np.flatnonzero(out >= count)).size:
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash (splitmix64's finalizer)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def token_budgets(
    rng: np.random.Generator, count: int, data: DataConfig, patch_size: int
) -> np.ndarray:
    """The most tokens that each of `count` images may take; int64 `[count]`.

    Each of several `data.budgets` gets its exact share, so that epochs are alike.
    """
    if data.sides is not None:
        return _side_budgets(rng, count, data.sides, patch_size)
    weights = np.array(data.budget_weights or [1.0] * len(data.budgets))
    ends = np.round(np.cumsum(weights) / weights.sum() * count).astype(np.int64)
    budgets = np.repeat(data.budgets, np.diff(ends, prepend=0))
    return rng.permutation(budgets.astype(np.int64))


def _side_budgets(
    rng: np.random.Generator, count: int, sides: Sides, patch_size: int
) -> np.ndarray:
    if sides.distribution == "uniform":
        share = rng.random(count)
    else:
        normal = _truncated_normal(
            rng, count, (-1 - sides.mean) / sides.std, (1 - sides.mean) / sides.std
        )
        share = (1 + sides.mean + sides.std * normal) / 2
    power = 1 if sides.of == "side" else 2
    low, high = sides.low**power, sides.high**power
    side = (low + (high - low) * share) ** (1 / power)
    return np.maximum(1, (side / patch_size) ** 2).astype(np.int64)


def crop_boxes(rng: np.random.Generator, sizes: np.ndarray, crop: Crop) -> np.ndarray:
    """A random box (top, left, height, width) in each image; int32 `[m, 4]`.

    Draws the box's share of the area and its aspect relative to the image's. A side
    longer than the image's is cut to it.

    Args:
      sizes: `[m, 2]` (height, width) of each image.
    """
    sizes = np.asarray(sizes, np.float64)
    low, high = crop.area
    area = rng.uniform(low, high, len(sizes))
    low, high = np.log(crop.aspect)
    stretch = np.exp(rng.uniform(low, high, len(sizes)))
    factors = np.stack([np.sqrt(area / stretch), np.sqrt(area * stretch)], -1)
    box = np.clip(np.round(sizes * factors), 1, sizes)
    corner = np.floor(rng.random((len(sizes), 2)) * (sizes - box + 1))
    return np.concatenate([corner, box], -1).astype(np.int32)


def drop_rate(drop: TokenDrop, seen: np.ndarray) -> np.ndarray:
    """The share of tokens to drop after training on `seen` images; shaped like it."""
    return drop.rate + (drop.last_rate - drop.rate) / (
        1 + np.exp(-np.clip((seen - drop.midpoint) / drop.timescale, -50, 50))
    )


def kept_tokens(
    rng: np.random.Generator,
    lengths: np.ndarray,
    drop: TokenDrop,
    *,
    seen: np.ndarray,
    longest: int,
) -> np.ndarray:
    """How many of its tokens each image keeps; int64 `[m]`, at least 1.

    NaViT, appendix on token dropping.

    Args:
      lengths: `[m]` tokens of each image.
      seen: `[m]` images trained on before each.
      longest: the most tokens that any image may have.
    """
    mean = drop_rate(drop, seen)
    if drop.kind == "beta":
        # u ~ Beta of mean m and variance 0.3 m (1 - m), times the most to drop.
        m = np.clip(mean / drop.most, 1e-6, 1 - 1e-6)
        spread = 1 / 0.3 - 1
        rate = drop.most * rng.beta(m * spread, (1 - m) * spread)
    elif drop.kind == "resolution":
        # The mean rises with the length; draws stay within two standard deviations.
        mean = mean + drop.delta * (2 * lengths / longest - 1)
        rate = mean + 0.02 * _truncated_normal(rng, len(lengths), -2.0, 2.0)
    else:
        rate = mean
    return np.maximum(1, np.round(lengths * (1 - np.clip(rate, 0, 1)))).astype(np.int64)


def _truncated_normal(
    rng: np.random.Generator, count: int, low: float, high: float
) -> np.ndarray:
    """Standard normals, redrawn until they lie in [low, high]; `[count]`."""
    out = rng.standard_normal(count)
    while (bad := np.flatnonzero((out < low) | (out > high))).size:
        out[bad] = rng.standard_normal(bad.size)
    return out
