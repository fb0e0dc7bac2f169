"""Dropping tokens in training: none, a constant share, and schedules of the share.

  python -m navit.bench.study configs/studies/token_drop.py --plot

NaViT, section 3.3. Every run takes the same model FLOPs on real
tokens, so dropping half of the tokens shows twice the images. Evaluation drops nothing.
"""

import dataclasses

from navit.config import (
    Classification,
    Config,
    DataConfig,
    EvalConfig,
    EvalTask,
    ModelConfig,
    OptimConfig,
    Study,
    Synthetic,
    TokenDrop,
    TrainConfig,
    VisionConfig,
)

# Half of the images that a run with a schedule sees.
_HALF_WAY = 2000.0


def get_study() -> Study:
    half = TokenDrop(kind="constant", rate=0.5)
    falling = dataclasses.replace(
        half,
        rate=0.75,
        final_rate=0.25,
        midpoint=_HALF_WAY,
        timescale=_HALF_WAY / 5,
    )
    rising = dataclasses.replace(falling, rate=0.25, final_rate=0.75)
    drops = {
        "none": None,
        "constant 1/2": half,
        "falling 3/4 to 1/4": falling,
        "rising 1/4 to 3/4": rising,
    }
    return Study(
        title="Dropping tokens in training",
        configs={name: _config(drop) for name, drop in drops.items()},
        flops=(0.5e12,),
    )


def _config(drop: TokenDrop | None) -> Config:
    return Config(
        model=ModelConfig(
            vision=VisionConfig(
                width=64, depth=2, mlp_dim=128, num_heads=2, num_classes=5
            ),
            text=None,
            attention="xla",  # faster here than "unpack": rows are short
        ),
        data=DataConfig(
            train=Synthetic(size=40_000, task="fine"),
            eval=Synthetic(size=400, seed=1, task="fine"),
            budgets=(256,),
            drop=drop,
            row_tokens=256,
            rows=12,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=30),
        train=TrainConfig(losses=(Classification(),), checkpoint_every=10_000),
        eval=EvalConfig(
            budgets=(64, 144, 256),
            tasks=(
                EvalTask("fine", "classification"),
                EvalTask("finest", "classification"),
            ),
        ),
    )
