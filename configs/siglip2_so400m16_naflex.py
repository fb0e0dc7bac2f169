"""SigLIP 2's NaFlex stage, So400m/16 (arXiv 2502.14786, section 2.4.2).

  navit train configs/siglip2_so400m16_naflex.py init=PATH data.train.path=...  \\
      model.text.tokenizer=gemma.model

PATH holds the weights after 90 % of the run with captioning and sigmoid losses at 256
tokens. This config is the rest of that run, stretched 3.75 times: 40e9 examples /
32,768 * 10 % * 3.75 steps. It draws a budget per image, while the paper draws one per
batch: rows have one length here, so a batch at 128 tokens would hold 8 times the images
of one at 1024 (data.budget_per=batch does that).
"""

import math

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
from navit.model import variants

BATCH = 32_768
LENGTHS = (128, 256, 576, 784, 1024)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vision=variants.vision("So400m/16"),
            text=variants.text(
                "So400m", vocab_size=256_000, length=64, tokenizer="gemma.model"
            ),
            # log(p / (1 - p)) with p = 1 / BATCH; init=PATH replaces it.
            init_bias=-math.log(BATCH - 1),
            remat="attention",
        ),
        data=DataConfig(
            train=Folder(),
            budgets=LENGTHS,
            # The row length with the least padding among those that fit one attention
            # kernel (576 + 576, 1024 + 128): 6.4 %, against 11.5 % in rows of 1024.
            row_tokens=1152,
            # BATCH images at 1.98 per row (navit plan), in whole groups of caption_rows
            # for up to 256 devices.
            rows=16_384,
            slots=4,
            caption_rows=8,
        ),
        optim=OptimConfig(
            lr=1e-3, weight_decay=1e-4, clip_norm=1.0, warmup_steps=20_000, start=0.9
        ),
        train=TrainConfig(
            steps=457_764, losses=(Sigmoid(),), log_every=50, checkpoint_every=5_000
        ),
        eval=EvalConfig(budgets=(64, 144, 256, 576, 676, 784, 900, 1024)),
    )
