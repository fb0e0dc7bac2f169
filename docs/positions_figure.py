"""Draws docs/positions.png: what each position embedding says of a grid's places.

python docs/positions_figure.py
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from navit.config import PositionConfig, RotaryConfig
from navit.model import rotary
from navit.model.positions import PositionEmbedding

GRID, AT, WIDTH, HEAD = (20, 30), (7, 11), 256, 64
FACTORIZED = dict(kind="factorized", size=32)
ADDED = {
    "siglip2, a table of 8×8": PositionConfig(size=8),
    "siglip2, bicubic": PositionConfig(size=8, resize="bicubic"),
    "siglip2, frame=square": PositionConfig(size=8, frame="square"),
    "learned_1d": PositionConfig(kind="learned_1d", size=600),
    "learned_2d": PositionConfig(kind="learned_2d", size=32),
    "factorized, absolute": PositionConfig(**FACTORIZED, coordinates="absolute"),
    "fractional, a table of 8": PositionConfig(kind="factorized", size=8),
    "fractional_aspect, 8": PositionConfig(
        kind="factorized", size=8, coordinates="fractional_aspect"
    ),
    "sinusoidal, product": PositionConfig(
        **FACTORIZED, coordinates="absolute", encoding="sinusoidal", combine="product"
    ),
    "fourier": PositionConfig(**FACTORIZED, coordinates="absolute", encoding="fourier"),
}
TURNED = {
    "rotary qwen, moonvit": RotaryConfig("qwen"),
    "rotary pixtral": RotaryConfig("pixtral"),
    "rotary eva": RotaryConfig("eva"),
    "rotary axial": RotaryConfig("axial"),
    "rotary mixed, at first": RotaryConfig("mixed"),
    "rotary dinov3": RotaryConfig("dinov3"),
}


def main() -> None:
    """Computes and draws."""
    figure = Figure(figsize=(10, 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1.2))
    axes = above.subplots(4, 4).reshape(-1)
    maps = {name: added(config) for name, config in ADDED.items()}
    maps |= {name: turned(config) for name, config in TURNED.items()}
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.plot(AT[1], AT[0], "k+")
        ax.set_title(name, size=9)
        ax.set(xticks=[], yticks=[])
    decay(*below.subplots(1, 2))
    figure.savefig(Path(__file__).with_name("positions.png"), dpi=100)


def places() -> tuple[jnp.ndarray, jnp.ndarray]:
    """coords and grid of the tokens of one image, `[1, n, 2]` each."""
    coords = jnp.asarray(np.indices(GRID).reshape(2, -1).T)[None]
    return coords, jnp.broadcast_to(jnp.asarray(GRID), coords.shape)


def added(config: PositionConfig) -> np.ndarray:
    """The cosine of each place's first embedding with the marked place's."""
    embed = PositionEmbedding(config, WIDTH, rngs=nnx.Rngs(0))
    x = np.asarray(embed(*places())[0]).reshape(*GRID, -1)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x[AT]


def turned(config: RotaryConfig) -> np.ndarray:
    """q·k / |q||k| of the same vector at both places, all pairs of equal length."""
    coords, grid = places()
    at = np.asarray(rotary.positions(config, coords, grid)[0]).reshape(*GRID, 2)
    if config.kind == "mixed":
        key = nnx.Rngs(0).params()
        theta = rotary.learned_theta(config)
        frequency = np.asarray(rotary.learned_frequencies(key, 1, HEAD, theta))[0]
    else:
        frequency = rotary.frequencies(config, HEAD)
    return np.cos((at - at[AT]) @ frequency).mean(-1)


def decay(bounds, products) -> None:
    """RoFormer's bound on q·k by distance (section 3.4.3, figure 2), and q·k itself.

    The bound is the mean length of the partial sums, in RoFormer's unit: it is known
    only up to a factor that depends on q and k, so it has a panel of its own.
    """
    distance = np.arange(257)
    for theta in (10_000.0, 100.0):
        frequency = theta ** (-2 * np.arange(HEAD // 2) / HEAD)
        turns = np.exp(1j * distance[:, None] * frequency)
        bound = np.abs(np.cumsum(turns, -1)).mean(-1)
        bounds.plot(distance, bound, label=f"theta {theta:,.0f}")
        products.plot(distance, turns.real.mean(-1), label=f"theta {theta:,.0f}")
    bounds.set_title("1-D RoPE: RoFormer's bound, up to a factor", size=9)
    products.set_title("1-D RoPE: q·k of equal q and k, of 1 at distance 0", size=9)
    products.axhline(0, color="gray", lw=0.5)
    bounds.set_ylim(0)
    for ax in (bounds, products):
        ax.set_xlabel("distance between two tokens")
        ax.set_xlim(0, 256)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
