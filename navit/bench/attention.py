"""Packed attention on this machine: every implementation, forward and with gradients.

  python -m navit.bench.attention
  python -m navit.bench.attention --mixes 2x4096x16 --heads 16 --width 72

Each line is one mix: rows x tokens in a row, and so many images of so many tokens at
most in each row (all as long as fit). Times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from navit.model.attention import attention

IMPLEMENTATIONS = ("xla", "unpack")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--mixes",
        default="8x256x1,2x1024x1,2x1024x2,2x1024x4,2x1024x8,1x4096x4,1x4096x16",
        help="rows x row tokens x images a row, several by commas",
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.heads} heads of {args.width}, {jax.default_backend()}; milliseconds")
    print(
        f"{'rows x tokens x images':>24}{'':10}", *map("{:>10}".format, IMPLEMENTATIONS)
    )
    for mix in args.mixes.split(","):
        rows, tokens, images = map(int, mix.split("x"))
        _line(rows, tokens, images, args.heads, args.width, args.rounds)


def _line(
    rows: int, tokens: int, images: int, heads: int, width: int, rounds: int
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(
        rng.standard_normal((3, rows, tokens, heads, width), np.float32)
    )
    ids = np.repeat(np.arange(1, images + 1), tokens // images)
    ids = np.pad(ids, (0, tokens - len(ids)))
    segment_ids = jnp.asarray(np.broadcast_to(ids, (rows, tokens)), jnp.int32)
    calls: dict[str, list[Callable[[], object]]] = {"forward": [], "gradients": []}
    for name in IMPLEMENTATIONS:
        attend = functools.partial(
            attention,
            segment_ids=segment_ids,
            implementation=name,
            max_segments=images,
            max_segment_tokens=tokens // images,
        )
        forward = jax.jit(attend)
        total = jax.jit(
            jax.grad(lambda *x, attend=attend: (attend(*x) ** 2).sum(), (0, 1, 2))
        )
        calls["forward"].append(functools.partial(forward, q, k, v))
        calls["gradients"].append(functools.partial(total, q, k, v))
    for what, sides in calls.items():
        times: list[list[float]] = [[] for _ in sides]
        for round in range(rounds + 1):  # the first compiles
            for side, found in zip(sides, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(side())
                if round:
                    found.append(1000 * (time.perf_counter() - start))
        medians = [f"{statistics.median(x):10.1f}" for x in times]
        print(f"{f'{rows} x {tokens} x {images}':>24} {what:9}", *medians, flush=True)


if __name__ == "__main__":
    main()
