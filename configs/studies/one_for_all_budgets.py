"""One checkpoint for every token budget, against one checkpoint per budget.

  python -m navit.bench.study configs/studies/one_for_all_budgets.py --plot

NaViT, section 3.2, and SigLIP 2, section 2.4.2. Each run takes the same model FLOPs on
real tokens, so the three towers of one budget take three times the compute together.
"""

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

_BUDGETS = (64, 256, 1024)
_BATCH = 3072  # tokens


def get_study() -> Study:
    each = {f"only {budget}": _config((budget,)) for budget in _BUDGETS}
    return Study(
        title="One checkpoint against one per budget",
        configs={"one for all": _config(_BUDGETS), **each},
        flops=(0.4e12,),
    )


def _config(budgets: tuple[int, ...]) -> Config:
    row_tokens = max(256, *budgets)
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
            eval=Synthetic(size=250, seed=1, task="fine"),
            budgets=budgets,
            row_tokens=row_tokens,
            rows=_BATCH // row_tokens,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=30),
        train=TrainConfig(losses=(Classification(),), checkpoint_every=10_000),
        eval=EvalConfig(
            budgets=_BUDGETS,
            tasks=(
                EvalTask("fine", "classification"),
                EvalTask("finest", "classification"),
            ),
        ),
    )
