"""What is looked at before and during a run, so that it does not fail in silence."""

from __future__ import annotations

import logging
import math

import numpy as np

from navit.config import Config
from navit.input import text
from navit.input.sources import Source
from navit.train.step import Metrics

log = logging.getLogger("navit")


def warn_before(config: Config, source: Source) -> None:
    """Says what is legal, and rarely meant."""
    if config.optim.warmup_steps >= config.train.steps:
        log.warning(
            "optim.warmup_steps=%d is not reached in train.steps=%d: the learning rate "
            "rises to the last step",
            *(config.optim.warmup_steps, config.train.steps),
        )
    if config.model.text is not None:
        some = np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int)
        captions = [c for i in some for c in source.captions(int(i))]
        cut = text.share_cut(captions, config.model.text.length)
        if cut:
            log.warning(
                "%.1f %% of the captions are longer than model.text.length=%d and lose "
                "their end",
                *(100 * cut, config.model.text.length),
            )


def check_finite(metrics: Metrics, step: int, saved: int | None) -> None:
    """Stops a run whose loss or gradient is not finite.

    Args:
      saved: the step of the last checkpoint.
    """
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {loss}, its gradient {norm}, at step {step}: lower optim.lr "
            f"or model.init_scale; the last checkpoint is of step {saved}"
        )
