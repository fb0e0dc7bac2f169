"""The towers of a run that starts from trained weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from navit.config.experiment import Config
from navit.config.model import ROUNDING, ModelConfig
from navit.config.overrides import differences, override

log = logging.getLogger("navit")

# Settings of a model that its weights do not depend on.
_FREE = (
    *ROUNDING,
    "model.init_",
    "model.text.tokenizer",
    "model.vision.fixed_grid",
    "model.vision.image_size",
    "model.vision.family",
)


def starting_from(
    config: Config, trained: ModelConfig, *, where: str, overrides: Sequence[str] = ()
) -> Config:
    """The config of a run that trains a model further.

    Args:
      trained: the model's config.
      where: where it lies, for messages.
      overrides: the `key.path=value`s that `config` was loaded with. With
        `init_towers`, those of the towers apply to the towers of the weights.

    Raises:
      ValueError: if the config states other towers than the weights have, or freezes a
        text tower that they lack.
    """
    trained = dataclasses.replace(trained, merger=None)  # training has no use for it
    if config.model.text is None:  # the run needs only the image tower
        trained = dataclasses.replace(trained, text=None)
    elif trained.text is None:
        if not config.optim.text_lr:
            raise ValueError(
                f"{where} has no text tower, so that of the run starts at random, and "
                "optim.text_lr=0 would freeze it: set optim.text_lr=1"
            )
        log.info("%s has no text tower: that of the run starts at random", where)
        trained = dataclasses.replace(trained, text=config.model.text)
    remedy = "init_towers=true takes the towers of the weights"
    if config.init_towers:
        remedy = "leave model.vision and model.text to the weights"
        model = dataclasses.replace(
            config.model, vision=trained.vision, text=trained.text
        )
        config = dataclasses.replace(config, model=model)
        towers = ("model.vision.", "model.text.")
        config = override(config, [x for x in overrides if x.startswith(towers)])
    if trained.vision.fixed_grid:
        log.info(
            "%s was trained at one size, %dx%d patches; from here on images keep their "
            "aspect",
            where,
            trained.vision.position.size,
            trained.vision.position.size,
        )
    vision = dataclasses.replace(
        config.model.vision,
        fixed_grid=False,
        image_size=None,
        family=trained.vision.family,
    )
    model = dataclasses.replace(config.model, vision=vision)
    check_towers(trained, model, where=where, remedy=remedy)
    return dataclasses.replace(config, model=model)


def check_towers(
    trained: ModelConfig, model: ModelConfig, *, where: str, remedy: str
) -> None:
    """Raises ValueError unless `model` has the sizes and settings of trained weights.

    Args:
      where, remedy: for the message.
    """
    changed = [
        difference
        for difference in differences(trained, model, "model")
        if not difference.startswith(_FREE)
    ]
    if changed:
        raise ValueError(
            f"{where} was trained otherwise ({'; '.join(changed[:3])}): {remedy}"
        )
