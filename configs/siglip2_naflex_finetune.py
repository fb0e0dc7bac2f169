"""Fine-tunes a SigLIP 2 checkpoint on your own photographs.

  navit train configs/siglip2_naflex_finetune.py init=PATH data.train.path=~/photos

PATH is a Hugging Face directory (siglip2-base-patch16-naflex, ...) or a big_vision
.npz with its tokenizer beside it. The run takes both towers from it (`init_towers`).
The text tower is frozen; optim.text_lr=1 trains it too.
"""

from navit.config import (
    Config,
    DataConfig,
    EvalConfig,
    Folder,
    ModelConfig,
    OptimConfig,
    Sigmoid,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(remat="attention"),
        data=DataConfig(
            train=Folder(split="train"),
            eval=Folder(split="eval"),
            budgets=(128, 256, 576, 784, 1024),
            row_tokens=1152,
            rows=32,
            slots=4,
            caption_rows=4,
        ),
        # Pretrained weights do not decay, and change slowly.
        optim=OptimConfig(lr=1e-5, warmup_steps=100, weight_decay=0.0, text_lr=0.0),
        train=TrainConfig(steps=2000, losses=(Sigmoid(),), checkpoint_every=500),
        eval=EvalConfig(budgets=(256, 729, 1024)),
        init_towers=True,
    )
