"""Finds, from the config, images that training and evaluation both read."""

from __future__ import annotations

import logging

from navit import config
from navit.config.sources import Single
from navit.sources.folder import same_table

log = logging.getLogger("navit")


def check_overlap(train: config.AnySource, evaluation: config.AnySource) -> None:
    """Warns if both read the same images; raises if that can only be a mistake.

    Raises:
      ValueError: if `train` is the held-out part of a folder and `evaluation` reads
        that part too, or if the two split one table by different holdouts.
    """
    shared = {
        _images(other): None
        for one in singles(train)
        for other in singles(evaluation)
        if _overlap(one, other)
    }
    if shared:
        log.warning(
            "data.train and data.eval both read %s: the evaluation is on images that "
            "the model is trained on. Set data.eval to other images to measure how "
            "well it generalizes",
            ", ".join(shared),
        )


def singles(source: config.AnySource) -> tuple[Single, ...]:
    """The sources of a mixture, or this one."""
    return source.sources if isinstance(source, config.Mixture) else (source,)


def _overlap(train: Single, held: Single) -> bool:
    if isinstance(train, config.Folder) and isinstance(held, config.Folder):
        # Released weights have no training folder.
        return bool(train.path and held.path) and _folders_overlap(train, held)
    return _images(train) == _images(held)


def _folders_overlap(train: config.Folder, held: config.Folder) -> bool:
    splits, same_holdout = {train.split, held.split}, train.holdout == held.holdout
    if (splits == {"train", "eval"} and same_holdout) or not same_table(train, held):
        return False
    if train.split == "eval" and held.split != "train":
        raise ValueError(
            f"data.train.split=eval and data.eval.split={held.split} would train on "
            f"the images of {train.path} that are held out for the evaluation: set "
            "data.train.split=train and data.eval.split=eval"
        )
    if "all" not in splits and not same_holdout:
        raise ValueError(
            f"data.train.holdout={train.holdout} and data.eval.holdout={held.holdout} "
            "differ, so some images would be in both: set them to the same share"
        )
    return True


def _images(source: Single) -> str:
    """Describes what a source reads; equal texts mean the same images."""
    match source:
        case config.Synthetic():
            return f"synthetic images of seed {source.seed}"
        case config.Tfds():
            folder = source.data_dir or ""
            return f"{source.name} split={source.split} {folder}".rstrip()
        case config.Folder():
            return f"the folder {source.path}"
    return source.path
