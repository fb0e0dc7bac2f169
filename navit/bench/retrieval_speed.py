"""Measures the time and memory of exact retrieval on random vectors.

  python -m navit.bench.retrieval_speed
  python -m navit.bench.retrieval_speed --images 5000 --texts 25000 --width 768

Prints recall and that of guessing, which should agree, the seconds for both directions,
and the most memory that the process held, vectors included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import jax
import numpy as np

from navit.evals.retrieval import chance, recall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--texts", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = _unit_vectors(rng, args.images, args.width)
    texts = _unit_vectors(rng, args.texts, args.width)
    pairs = np.stack((np.arange(args.texts) % args.images, np.arange(args.texts)), -1)
    print(
        f"{args.images} images x {args.texts} texts x {args.width}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    start = time.perf_counter()
    for name, queries, candidates, right in (
        ("image to text", images, texts, pairs),
        ("text to image", texts, images, pairs[:, ::-1]),
    ):
        found = recall(queries, candidates, right)
        guessed = chance(right, len(candidates))
        cells = (f"R@{k} {100 * found[k]:.3f} ({100 * guessed[k]:.3f})" for k in found)
        print(f"{name}, % (chance):", *cells, flush=True)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"{seconds:.1f} s, at most {peak:.2f} GiB", flush=True)


def _unit_vectors(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    x = rng.standard_normal((count, width), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


if __name__ == "__main__":
    main()
