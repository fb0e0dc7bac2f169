"""The optimizer, its schedule, and what is averaged over a run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from navit.config.overrides import positive


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to zero (SigLIP 2 section 2.1).

    `weight_decay`: the share of every kernel that a step takes away at the schedule's
    peak, and less during warm-up and cosine; as in big_vision, `lr`, `vision_lr`,
    `text_lr` and `layer_decay` do not multiply it. (AdamW elsewhere multiplies it by
    `lr`: torch's 0.1 at lr=1e-3 is 1e-4 here.) Biases, norms, embeddings, tables and
    the probe do not decay.
    `start`: the run is the end of a longer schedule, after this share of it: SigLIP 2's
    NaFlex stage resumes at 0.9 (section 2.4.2). `vision_lr`, `text_lr`: factors for the
    towers; 0 freezes a tower.
    `name`: "adafactor" is big_vision's: second moments by row and column with decay up
    to `b2`, first moments in bfloat16 (arXiv 2106.04560, section 3.5). "muon"
    orthogonalizes the momentum (0.95) of the kernels in the blocks and in the MAP head,
    and scales it to AdamW's size, so that `lr` and `weight_decay` stay as they are for
    AdamW (arXiv 2502.16982, section 2.2); AdamW trains the rest. "lion" usually takes a
    third to a tenth of AdamW's `lr`, and b2=0.99 (arXiv 2302.06675, section 5); the
    same `weight_decay`, as `lr` does not multiply it here.
    `schedule`, after the warm-up: "cosine"; "rsqrt", which falls as
    1/sqrt(1 + step/timescale); "wsd" and "constant", which stay at the peak. "rsqrt"
    and "wsd" end in a linear cool-down to zero over `cooldown_steps`; None is a fifth
    of the whole schedule.
    `ema`: keeps a moving average of the weights with this decay, such as 0.9999, which
    is evaluated and exported; None keeps none. Early on, the decay after t steps is at
    most (1 + t) / (10 + t).
    `layer_decay`: each block learns at this factor of the learning rate of the block
    after it, as in timm: what comes after the blocks has 1, block i of d has
    layer_decay ** (d + 1 - i), the norm at the end that of the last block, and what
    comes before the blocks layer_decay ** (d + 1).
    """

    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    start: float = 0.0
    vision_lr: float = 1.0
    text_lr: float = 1.0
    name: Literal["adamw", "adafactor", "muon", "lion"] = "adamw"
    schedule: Literal["cosine", "rsqrt", "wsd", "constant"] = "cosine"
    cooldown_steps: int | None = None
    timescale: int = 10_000
    ema: float | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "lr", "clip_norm", "timescale")
        if not 0 <= self.start < 1:
            raise ValueError(f"start must be a share in [0, 1), not {self.start}")
        for name in ("warmup_steps", "weight_decay", "vision_lr", "text_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(
                f"ema must be a decay between 0 and 1, such as 0.9999, not {self.ema}: "
                "set ema=none to keep no average"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                "layer_decay must be a factor above 0 and at most 1 (1 for the same "
                f"learning rate everywhere), not {self.layer_decay}"
            )
        self._check_cooldown()

    def _check_cooldown(self) -> None:
        if self.cooldown_steps is None:
            return
        if self.schedule not in ("rsqrt", "wsd"):
            raise ValueError(
                f"schedule={self.schedule} has no cool-down, but cooldown_steps is "
                f"{self.cooldown_steps}: choose rsqrt or wsd, or leave it at none"
            )
        if self.cooldown_steps < 0:
            raise ValueError(
                f"cooldown_steps must be 0 or more, not {self.cooldown_steps}"
            )
