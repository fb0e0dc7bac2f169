"""Position embeddings beyond the training range: six added ones, three rotary ones.

  python -m navit.bench.study configs/studies/position_range.py --plot

NaViT, section 3.4 (table 3, figure 16). Every run trains on at most 256 tokens
and aspects up to 2, and is evaluated at 256 and 1024 and at aspects from 3 to 4. The
label, the dots' colour, does not depend on positions: the study asks how much accuracy
untrained ones cost. Every run sees the same images.
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
    PositionConfig,
    RotaryConfig,
    Study,
    Synthetic,
    TrainConfig,
    VisionConfig,
)

# The tables of positions in patches are as long as the longest side of the evaluation.
_LONGEST = 64


def get_study() -> Study:
    factorized = PositionConfig(kind="factorized")
    kinds = {
        "siglip2": PositionConfig(kind="siglip2"),
        "learned 2D": PositionConfig(kind="learned_2d", size=_LONGEST),
        "absolute": dataclasses.replace(
            factorized, coordinates="absolute", size=_LONGEST
        ),
        "fractional": factorized,
        "fractional, aspect": dataclasses.replace(
            factorized, coordinates="fractional_aspect"
        ),
        "Fourier, absolute": dataclasses.replace(
            factorized, coordinates="absolute", encoding="fourier"
        ),
    }
    added = {name: _config(position) for name, position in kinds.items()}
    none = PositionConfig(kind="none")
    turned = {
        "rotary": _config(none, RotaryConfig("qwen")),
        "rotary, -1 to 1": _config(none, RotaryConfig("dinov3")),
        "rotary, learned": _config(none, RotaryConfig("mixed")),
    }
    return Study(
        title="Position embeddings beyond the training range",
        configs=added | turned,
        flops=(0.3e12,),
    )


def _config(position: PositionConfig, rotary: RotaryConfig | None = None) -> Config:
    usual = Synthetic(size=120, seed=1, task="fine", aspect=(1.0, 2.0))
    unusual = dataclasses.replace(usual, aspect=(3.0, 4.0))
    return Config(
        model=ModelConfig(
            vision=VisionConfig(
                width=64,
                depth=2,
                mlp_dim=128,
                num_heads=2,
                num_classes=5,
                position=position,
                rotary=rotary,
            ),
            text=None,
            attention="xla",  # faster here than "unpack": rows are short
        ),
        data=DataConfig(
            train=Synthetic(size=40_000, task="fine", aspect=(1.0, 2.0)),
            eval=usual,
            budgets=(64, 144, 256),
            row_tokens=256,
            rows=12,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=30),
        train=TrainConfig(losses=(Classification(),), checkpoint_every=10_000),
        eval=EvalConfig(
            budgets=(256, 1024),
            tasks=(
                EvalTask("aspect_1_to_2", "classification", task="fine"),
                EvalTask("aspect_3_to_4", "classification", unusual, task="fine"),
            ),
        ),
    )
