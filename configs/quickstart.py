"""Two small towers on the built-in dataset, trained and evaluated in minutes.

  navit train configs/quickstart.py

Takes three minutes on 2 CPU cores. Expect a coarse accuracy (a large figure's colour,
chance 14.3 %) of about 99 % at every budget. The run is too short for the fine tasks
(the colour of dots); budgets_demo.py learns those.
"""

from navit.config import (
    Config,
    DataConfig,
    EvalConfig,
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
            budgets=(64, 144),
            row_tokens=512,
            rows=8,
            slots=6,
        ),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=30),
        train=TrainConfig(
            steps=300, losses=(Softmax(),), log_every=10, checkpoint_every=100
        ),
        eval=EvalConfig(budgets=(256, 729, 1024)),
    )
