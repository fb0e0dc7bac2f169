"""Images a second of a training step on a CPU: packed rows, or rows of timm.

  python -m navit.bench.training                       # only navit
  pip install torch timm && python -m navit.bench.training --peer timm
  pip install torch transformers && python -m navit.bench.training --peer torch \\
      --size B --tokens 65536 --rows 1024,4096      # on a GPU

With `--peer torch` both towers are trained, on a CPU or a GPU
(`navit.bench.torch_pair`). Otherwise the model is a tower (Ti by default) with mean
pooling and 100 classes; a step is the loss and the gradients of all parameters, without
an update. Both sides take the same images, of drawn lengths
(`navit.bench.attention_speed`), in float32: navit packs them into rows of each length,
and timm's NaFlexViT pads them to the longest of the step. They take turns on the same
cores. A rate is of the median time of the rounds, a ratio the median of the rounds'
ratios. "products" is the share of navit's time that the blocks' products with
parameters need by themselves; attention's own products are not among them. The last
lines compare the ratios to the aims.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit.batch import Batch, PackedImages
from navit.bench.attention_speed import IMPLEMENTATIONS, LENGTHS
from navit.config import Classification, Config, DataConfig, ModelConfig, TrainConfig
from navit.model import variants
from navit.model.two_tower import TwoTower
from navit.plan.geometry import grid_for
from navit.plan.rows import Rows, pack_rows
from navit.train.step import batch_loss

CLASSES = 100
# The least ratio at the best row length, and at any.
AIMS = {"navit": 1.6, "naflex": 1.3, "native": 1.3}
AT_ANY_LENGTH = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=("timm", "torch"), help="compare to it")
    parser.add_argument("--size", default="Ti", help="Ti, S, B, L or So400m")
    parser.add_argument("--mixes", default="navit,naflex,native")
    parser.add_argument("--rows", default="576,1024,2048,4096", help="row lengths")
    parser.add_argument("--tokens", type=int, default=4096, help="in a step, about")
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    kinds = ("auto", *IMPLEMENTATIONS, "flash")
    parser.add_argument("--attention", choices=kinds, default="auto", help="of navit")
    args = parser.parse_args()
    for mix in args.mixes.split(","):
        if mix not in LENGTHS:
            parser.error(f"--mixes {mix} is not one of {', '.join(LENGTHS)}")
    if args.peer == "torch":
        from navit.bench import torch_pair  # which imports this module

        torch_pair.run(args)
        return
    peer = _timm(args.size) if args.peer else None
    print(f"{args.size}/16, {jax.default_backend()}; images a second")
    titles = ("mix", "row", "fill", "navit", args.peer or "", "ratio", "products")
    print(*map("{:>8}".format, titles), flush=True)
    ratios: dict[str, list[float]] = {}
    for mix in args.mixes.split(","):
        for row in map(int, args.rows.split(",")):
            if row < LENGTHS[mix][1]:
                continue  # an image may be longer than the row
            parts = _steps(mix, row, max(1, round(args.tokens / row)), args.steps)
            longest = LENGTHS[mix][1]
            sides = {"navit": _navit(args.size, row, parts, longest, args.attention)}
            if peer is not None:
                sides["peer"] = peer(parts)
            sides["products"] = _products(args.size, row, parts)
            ratio = _report(mix, row, parts, sides, args.rounds)
            if ratio is not None:
                ratios.setdefault(mix, []).append(ratio)
    for mix, found in ratios.items():
        print(_verdict(mix, found), flush=True)


def _verdict(mix: str, ratios: list[float]) -> str:
    """Whether the ratios at all row lengths reach the aims."""
    checks = [
        ("best", max(ratios), AIMS[mix]),
        ("least", min(ratios), AT_ANY_LENGTH),
    ]
    parts = [
        f"{name} {ratio:.2f}, aim {aim} {'met' if ratio >= aim else 'missed'}"
        for name, ratio, aim in checks
    ]
    return f"{mix}: {'; '.join(parts)}"


def _steps(mix: str, row_tokens: int, rows: int, steps: int) -> list[Rows]:
    """The rows of each step, packed as a plan does; the last rows are left out."""
    rng = np.random.default_rng(0)
    draw, longest = LENGTHS[mix]
    count = 3 * steps * rows * row_tokens // int(draw(rng, 1000).mean())
    # Shapes of photographs, which each take the tokens drawn for them.
    aspects = np.exp(rng.uniform(-0.6, 0.6, count))
    grids = np.array(
        [
            grid_for(4096, int(4096 * aspect), patch_size=16, max_tokens=int(tokens))
            for aspect, tokens in zip(aspects, draw(rng, count), strict=True)
        ]
    )
    assert grids.prod(-1).max() <= longest
    packed = pack_rows(grids, row_tokens, None)
    return [packed.slice(i * rows, (i + 1) * rows) for i in range(steps)]


def _navit(
    size: str, row_tokens: int, parts: list[Rows], longest: int, attention: Any
) -> Callable[[], Any]:
    slots = max(int(np.diff(part.offsets).max()) for part in parts)
    vision = variants.vision(f"{size}/16", pool="mean", num_classes=CLASSES)
    config = Config(
        model=ModelConfig(vision=vision, text=None, attention=attention),
        data=DataConfig(
            budgets=(longest,), row_tokens=row_tokens, rows=len(parts[0]), slots=slots
        ),
        train=TrainConfig(losses=(Classification(),)),
    )
    model = jax.jit(lambda key: TwoTower(config.model, rngs=nnx.Rngs(key)))(
        jax.random.key(0)
    )
    batches = [jax.tree.map(jnp.asarray, _batch(x, row_tokens, slots)) for x in parts]
    step = jax.jit(
        jax.value_and_grad(lambda m, b: batch_loss(m, b, config), has_aux=True)
    )

    def run() -> None:
        for batch in batches:
            jax.block_until_ready(step(model, batch))

    return run


def _products(size: str, row_tokens: int, parts: list[Rows]) -> Callable[[], Any]:
    """The products with the blocks' parameters, forward and backward."""
    c = variants.vision(f"{size}/16")
    tokens = len(parts[0]) * row_tokens
    shapes = [(c.width, 3 * c.width), (c.width, c.width)]
    shapes += [(c.width, c.mlp_dim), (c.mlp_dim, c.width)]
    arrays = [
        (jnp.ones((tokens, i)), jnp.ones((i, o)), jnp.ones((tokens, o)))
        for i, o in shapes
    ]

    @jax.jit
    def layer(arrays: list[tuple[jax.Array, ...]]) -> object:
        return [(x @ w, g @ w.T, x.T @ g) for x, w, g in arrays]

    def run() -> None:
        for _ in range(c.depth * len(parts)):
            jax.block_until_ready(layer(arrays))

    return run


def _batch(rows: Rows, row_tokens: int, slots: int) -> Batch:
    b = len(rows)
    rng = np.random.default_rng(0)
    ids = np.zeros((b, row_tokens), np.int32)
    coords = np.zeros((b, row_tokens, 2), np.int32)
    grids = np.zeros((b, slots, 2), np.int32)
    for row in range(b):
        own = rows.slice(row, row + 1)
        grids[row, : len(own.grids)] = own.grids
        total = int(own.lengths.sum())
        ids[row, :total] = np.repeat(np.arange(len(own.grids)) + 1, own.lengths)
        coords[row, :total] = np.concatenate([_coords(grid) for grid in own.grids])
    filled = grids[..., 0] > 0
    patches = rng.integers(0, 256, (b, row_tokens, 768), np.uint8)
    return Batch(
        images=PackedImages(patches, ids, coords, grids),
        text=np.zeros((1, 1, 1), np.int32),
        owner=np.where(filled, 0, -1),
        label=np.where(filled, rng.integers(0, CLASSES, filled.shape), -1),
        id=None,
        size=np.ones((b, slots, 2), np.int32),
    )


def _coords(grid: np.ndarray) -> np.ndarray:
    return np.indices(tuple(grid)).reshape(2, -1).T


def _timm(size: str) -> Callable[[list[Rows]], Callable[[], Any]]:
    try:
        import torch
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    except ImportError as error:
        raise SystemExit(
            f"--peer timm: {error}: pip install torch timm, or leave --peer out"
        ) from error
    vision = variants.vision(f"{size}/16")
    cfg = NaFlexVitCfg(
        embed_dim=vision.width,
        depth=vision.depth,
        num_heads=vision.num_heads,
        mlp_ratio=vision.mlp_dim / vision.width,
        act_layer="gelu_tanh",
        global_pool="avg",
    )
    torch.manual_seed(0)
    model = NaFlexVit(cfg, num_classes=CLASSES).train()

    def batch(rows: Rows) -> dict[str, Any]:
        count, longest = len(rows.grids), int(rows.lengths.max())
        valid = torch.arange(longest)[None] < torch.tensor(rows.lengths)[:, None]
        coord = torch.zeros((count, longest, 2), dtype=torch.long)
        for i, grid in enumerate(rows.grids):
            coord[i, : grid.prod()] = torch.from_numpy(_coords(grid))
        patches = torch.randn(count, longest, 768) * valid[..., None]
        return dict(patches=patches, patch_coord=coord, patch_valid=valid)

    def side(parts: list[Rows]) -> Callable[[], Any]:
        batches = [batch(rows) for rows in parts]
        labels = [torch.randint(CLASSES, (len(rows.grids),)) for rows in parts]

        def run() -> None:
            for inputs, label in zip(batches, labels, strict=True):
                model.zero_grad()
                logits = model(inputs)
                torch.nn.functional.cross_entropy(logits, label).backward()

        return run

    return side


def _report(
    mix: str,
    row: int,
    parts: list[Rows],
    sides: dict[str, Callable[[], Any]],
    rounds: int,
) -> float | None:
    """Times the sides, prints a line, and returns the ratio to the peer if any."""
    images = sum(len(part.grids) for part in parts)
    tokens = sum(int(part.lengths.sum()) for part in parts)
    fill = tokens / sum(len(part) * row for part in parts)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round in range(rounds + 1):  # the first compiles
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if round:
                times[name].append(time.perf_counter() - start)
    taken = {name: statistics.median(x) for name, x in times.items()}
    peer, ratio = "", None
    if "peer" in times:
        peer = f"{images / taken['peer']:.2f}"
        pairs = zip(times["peer"], times["navit"], strict=True)
        ratio = statistics.median(b / a for b, a in pairs)
    pairs = zip(times["products"], times["navit"], strict=True)
    products = f"{statistics.median(b / a for b, a in pairs):.2f}"
    shown = "" if ratio is None else f"{ratio:.2f}"
    figures = (f"{images / taken['navit']:.2f}", peer, shown, products)
    print(f"{mix:>8} {row:8} {fill:8.3f}", *map("{:>8}".format, figures), flush=True)
    return ratio


if __name__ == "__main__":
    main()
