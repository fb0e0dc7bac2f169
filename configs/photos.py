"""Your own photographs: a folder with a CSV or JSONL table of file,caption[,label].

  navit train configs/photos.py data.train.path=~/photos

Without a path it reads data/sample. A hash of an image's name decides whether it is
held out for evaluation: about a fifth of a large folder, more or less of a small one
(7 of the 17 images of data/sample). data.train.holdout and data.eval.holdout set the
share.
"""

from navit.config import (
    Config,
    DataConfig,
    EvalConfig,
    Folder,
    ModelConfig,
    OptimConfig,
    Softmax,
    TextConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vision=VisionConfig(width=128, depth=4, mlp_dim=512, num_heads=2),
            text=TextConfig(length=64, width=128, depth=2, mlp_dim=256, num_heads=2),
        ),
        data=DataConfig(
            train=Folder(path="data/sample", split="train", holdout=0.2),
            eval=Folder(split="eval", holdout=0.2),
            budgets=(64, 144, 256),
            row_tokens=1024,
            rows=4,
            slots=10,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=20),
        train=TrainConfig(
            steps=200, losses=(Softmax(),), log_every=10, checkpoint_every=100
        ),
        eval=EvalConfig(budgets=(256, 729, 1024), prompts=("{}", "a photo of {}")),
    )
