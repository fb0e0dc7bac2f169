"""Images a second of packed evaluation, against one image in each padded row.

  python -m navit.bench.evaluation
  python -m navit.bench.evaluation --size B --budget 1024 --images 64

Both sides embed the same photographs, decoded beforehand, with the same random weights
and at native resolution: none is enlarged, and the images take --share of the budget on
average. A padded row has as many tokens as the budget. The sides take turns, and the
median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
from flax import nnx

from navit import embed_batches
from navit.config import Config, DataConfig, ModelConfig
from navit.embed import Embedder
from navit.model import variants
from navit.model.two_tower import TwoTower
from navit.sources.source import Record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="S", help="Ti, S, B, L or So400m")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.5, help="of the budget")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = Config(
        model=ModelConfig(
            vision=variants.vision(f"{args.size}/16"),
            text=variants.text(args.size, depth=1, vocab_size=258, length=16),
        ),
        data=DataConfig(max_upscale=1.0),
    )
    embedder = Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=0)
    images = _images(args.images, args.budget, args.share)
    sizes = np.array([x.shape[:2] for x in images])
    tokens = embed_batches.grids_of(config, sizes, args.budget).prod(-1)
    print(
        f"{len(images)} images of {tokens.min()} to {tokens.max()} tokens, "
        f"{tokens.mean() / args.budget:.0%} of a budget of {args.budget} on average"
    )

    def packed() -> np.ndarray:
        return embedder.embed_source(
            lambda i: Record(images[i]), sizes, args.budget
        ).vectors

    def padded() -> np.ndarray:
        with mock.patch.object(embed_batches, "slots_of", lambda config: 1):
            return packed()

    sides: dict[str, Callable[[], np.ndarray]] = {"packed": packed, "padded": padded}
    first, second = (side() for side in sides.values())  # compiles
    print(f"largest difference of a vector {np.abs(first - second).max():.1e}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    rates = {name: len(images) / statistics.median(x) for name, x in times.items()}
    for name, rate in rates.items():
        print(f"{name}  {rate:7.2f} images/s")
    print(f"ratio   {rates['packed'] / rates['padded']:7.2f}")


def _images(count: int, budget: int, share: float) -> list[np.ndarray]:
    """Random pixels in random shapes, whose tokens are `share` of the budget."""
    rng = np.random.default_rng(0)
    # Uniform around the share, as far as it is from nothing and from the budget.
    spread = 0.9 * min(share, 1 - share)
    tokens = budget * rng.uniform(share - spread, share + spread, count)
    aspect = np.exp(rng.uniform(np.log(0.5), np.log(2), count))
    rows = np.maximum(1, np.round(np.sqrt(tokens * aspect)))
    columns = np.maximum(1, np.floor(np.minimum(tokens, budget) / rows))
    sizes = (16 * np.stack([rows, columns], -1)).astype(int).tolist()
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


if __name__ == "__main__":
    main()
