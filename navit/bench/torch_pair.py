"""`navit.bench.training --peer torch`: both towers, against PyTorch padded.

The peer is transformers' Siglip2Model of the same size, with PyTorch's scaled dot
product attention and its own loss, and images padded to the longest of the step or to
1024 tokens. On a GPU both sides compute in bfloat16. MFU counts the model's operations
on real tokens (`navit.model.flops`). Nothing of this has been run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit.batch import Batch
from navit.bench import training
from navit.bench.attention_speed import LENGTHS
from navit.bench.provenance import provenance
from navit.config import Config, DataConfig, ModelConfig, Sigmoid, TrainConfig
from navit.model import flops, variants
from navit.model.two_tower import TwoTower
from navit.plan.rows import Rows
from navit.train.step import batch_loss

CAPTION, VOCABULARY = 64, 32_000
# Tokens of an image that is padded to a fixed length.
FIXED = 1024


def run(args: argparse.Namespace) -> None:
    """Prints images a second, MFU and ratios for every mix and row length."""
    # Otherwise jax takes most of a GPU's memory at its start, and PyTorch lacks it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peer = _torch(args.size)
    print(provenance())
    print(f"{args.size}/16 and its text tower; images a second (MFU), times as fast")
    titles = ("mix", "row", "navit", "to the longest", f"to {FIXED}")
    print("{:>8}{:>8}{:>18}{:>24}{:>24}".format(*titles), flush=True)
    for mix in args.mixes.split(","):
        for row in map(int, args.rows.split(",")):
            if row < LENGTHS[mix][1]:
                continue  # an image may be longer than the row
            rows = max(1, round(args.tokens / row))
            parts = training._steps(mix, row, rows, args.steps)
            config = _config(args.size, row, parts, LENGTHS[mix][1], args.attention)
            sides = [_navit(config, parts), peer(parts, None), peer(parts, FIXED)]
            _report(mix, row, config, parts, sides, args.rounds)


def _config(
    size: str, row: int, parts: list[Rows], longest: int, attention: Any = "auto"
) -> Config:
    slots = max(int(np.diff(part.offsets).max()) for part in parts)
    text = variants.text(size, vocab_size=VOCABULARY, length=CAPTION)
    return Config(
        model=ModelConfig(
            vision=variants.vision(f"{size}/16"), text=text, attention=attention
        ),
        data=DataConfig(
            budgets=(longest,), row_tokens=row, rows=len(parts[0]), slots=slots
        ),
        train=TrainConfig(losses=(Sigmoid(),)),
    )


def _navit(config: Config, parts: list[Rows]) -> Callable[[], Any]:
    model = jax.jit(lambda key: TwoTower(config.model, rngs=nnx.Rngs(key)))(
        jax.random.key(0)
    )
    batches = [jax.tree.map(jnp.asarray, _batch(config, part)) for part in parts]
    step = jax.jit(
        jax.value_and_grad(lambda m, b: batch_loss(m, b, config), has_aux=True)
    )

    def call() -> None:
        for batch in batches:
            jax.block_until_ready(step(model, batch))

    return call


def _batch(config: Config, rows: Rows) -> Batch:
    """Every image has a caption of its own."""
    slots = config.data.slots
    assert slots is not None
    batch = training._batch(rows, config.data.row_tokens, slots)
    filled, shape = batch.images.grids[..., 0] > 0, (len(rows), slots, CAPTION)
    return batch._replace(
        text=np.random.default_rng(1).integers(1, VOCABULARY, shape, np.int32),
        owner=np.where(filled, np.arange(slots, dtype=np.int32), -1),
    )


def _counts(parts: list[Rows]) -> flops.Counts:
    lengths = np.concatenate([part.lengths for part in parts]).astype(np.int64)
    images = [len(part.grids) for part in parts]
    return flops.Counts(
        tokens=int(lengths.sum()),
        squares=int((lengths**2).sum()),
        images=sum(images),
        captions=sum(images),
        pairs=sum(x**2 for x in images),
    )


def _torch(size: str) -> Callable[[list[Rows], int | None], Callable[[], Any]]:
    try:
        import torch
        from transformers import Siglip2Config, Siglip2Model
    except ImportError as error:
        raise SystemExit(
            f"--peer torch: {error}: pip install torch transformers, or leave it out"
        ) from error
    tower = variants.vision(f"{size}/16")
    sizes = dict(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.num_heads,
    )
    words = dict(vocab_size=VOCABULARY, max_position_embeddings=CAPTION)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    settings = Siglip2Config(
        text_config=dict(**sizes, **words, projection_size=tower.width),
        vision_config=dict(**sizes, num_patches=256, patch_size=16),
    )
    model = Siglip2Model._from_config(settings, attn_implementation="sdpa")
    model = model.to(device).train()

    def batch(rows: Rows, tokens: int) -> dict[str, Any]:
        count = len(rows.grids)
        valid = torch.arange(tokens)[None] < torch.tensor(rows.lengths)[:, None]
        found = dict(
            input_ids=torch.randint(1, VOCABULARY, (count, CAPTION)),
            pixel_values=torch.randn(count, tokens, 768) * valid[..., None],
            pixel_attention_mask=valid.int(),
            spatial_shapes=torch.from_numpy(rows.grids.astype(np.int64)),
        )
        return {name: x.to(device) for name, x in found.items()}

    def side(parts: list[Rows], tokens: int | None) -> Callable[[], Any]:
        batches = [batch(x, tokens or int(x.lengths.max())) for x in parts]

        def call() -> None:
            for inputs in batches:
                model.zero_grad()
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss = model(**inputs, return_loss=True).loss
                loss.backward()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    return side


def _report(
    mix: str,
    row: int,
    config: Config,
    parts: list[Rows],
    sides: list[Callable[[], Any]],
    rounds: int,
) -> None:
    times: list[list[float]] = [[] for _ in sides]
    for round in range(rounds + 1):  # the first compiles
        for call, seconds in zip(sides, times, strict=True):
            start = time.perf_counter()
            call()
            if round:
                seconds.append(time.perf_counter() - start)
    counts = _counts(parts)
    work = flops.train_step(config, counts).total
    peak = flops.peak(jax.devices()[0].device_kind)
    cells = []
    for median in map(statistics.median, times):
        share = f" ({work / median / peak:.0%})" if peak else ""
        cells.append(f"{counts.images / median:.2f}{share}")
    for i in (1, 2):
        pairs = zip(times[i], times[0], strict=True)
        cells[i] += f"  {statistics.median(b / a for b, a in pairs):.2f}"
    print("{:>8}{:>8}{:>18}{:>24}{:>24}".format(mix, row, *cells), flush=True)
