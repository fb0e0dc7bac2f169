"""Mixed resolutions with their aspect, packed, against one fixed square resolution.

  python -m navit.bench.study configs/studies/mixed_resolution.py --plot

NaViT, sections 3.1 and 3.2. The task is the colour of the dots, which takes
tokens. Every run takes the same model FLOPs on real tokens.
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
    TrainConfig,
    VisionConfig,
)


def get_study() -> Study:
    mixed = Config(
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
            budgets=(36, 64, 144, 256),
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
    square = dataclasses.replace(mixed.data, square=True, budgets=(144,))
    return Study(
        title="Mixed resolutions against one square resolution",
        configs={
            "mixed": mixed,
            "square 12x12": dataclasses.replace(mixed, data=square),
        },
        flops=(0.2e12, 0.4e12, 0.8e12),
        budgets=(144, 256),
    )
