"""The configuration of a study: configs to compare at equal training compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from navit.config.experiment import Config


@dataclasses.dataclass(frozen=True)
class Study:
    """Named configs, each trained on the same compute, once for each seed.

    `flops`: the model FLOPs of a run, on real tokens (`navit/model/flops.py`). With
    several, each config is trained anew for each. A run's number of steps follows from
    it, and replaces `train.steps`.
    `seeds`: each replaces `train.seed` and `data.seed`, so weights and order differ,
    and the images do not.
    `panels`: the evaluations to draw, by their names in `eval.tasks`; empty for all.
    `budgets`: those to draw, if there are several `flops`; empty for all.
    """

    title: str
    configs: Mapping[str, Config]
    flops: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    panels: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.configs or not self.seeds:
            raise ValueError("a study needs configs and seeds, and lacks one of them")
        if not self.flops or not min(self.flops) > 0:
            raise ValueError(f"a study needs positive FLOPs, not {self.flops}")
