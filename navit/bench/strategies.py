"""Measures how fast each resolution strategy plans the views of many images.

  python -m navit.bench.strategies
  python -m navit.bench.strategies --images 1000000

Sizes are distinct draws: both sides log-uniform from 32 to 4096 pixels. The time is for
`--images` images on one core, scaled to a million.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from navit.plan import strategies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    images = parser.parse_args().images
    sides = np.random.default_rng(0).uniform(5, 12, (images, 2))
    sizes = (2**sides).astype(int).tolist()
    print(f"{'strategy':14} {'s per million':>13} {'views':>6} {'refused':>8}")
    for name, kind in strategies.BY_NAME.items():
        strategy, views, refused = kind(), 0, 0
        start = time.perf_counter()
        for height, width in sizes:
            try:
                views += len(strategy.views(height, width))
            except ValueError:
                refused += 1
        seconds = (time.perf_counter() - start) / images * 1e6
        mean = views / max(1, images - refused)
        print(f"{name:14} {seconds:13.1f} {mean:6.1f} {refused:8}")


if __name__ == "__main__":
    main()
