"""Contrastive training on tiles: every image is cut as InternVL cuts it.

  navit train configs/tiles_internvl.py

An image becomes up to six tiles and a thumbnail, each a segment of its own; their
vectors are averaged, weighted by their tokens. Any strategy of `navit.strategies` can
take InternVL's place: `data.strategy=qwen data.strategy.patch=16`.

Small towers on the built-in dataset, in minutes on 2 CPU cores. A published size, such
as `InternVL(max_tiles=6)`, needs patches of 14, rows of 1024 tokens, which hold one
tile each, and `caption_rows` of at least 7, better 32 (docs/strategies.md).
"""

from navit import strategies
from navit.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Softmax,
    Synthetic,
    TextConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vision=VisionConfig(width=128, depth=2, mlp_dim=256, num_heads=2),
            text=TextConfig(length=20, width=128, depth=2, mlp_dim=256, num_heads=2),
        ),
        data=DataConfig(
            train=Synthetic(size=20_000, seed=0),
            eval=Synthetic(size=256, seed=1),
            strategy=strategies.InternVL(tile=64, max_tiles=6, patch=16),
            # A view has 16 tokens. The views of an image may lie in several rows, but
            # only in those of one group.
            row_tokens=128,
            rows=32,
            slots=16,
            caption_rows=4,
            captions=9,
        ),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=30),
        train=TrainConfig(
            steps=300, losses=(Softmax(),), log_every=10, checkpoint_every=100
        ),
    )
