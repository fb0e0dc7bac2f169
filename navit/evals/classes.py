"""Names of classes: those of a file, and those of two sets, matched to the labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from navit.sources.names import class_names
from navit.sources.source import Task

log = logging.getLogger("navit")


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no names of their own: the sources then number them."""
    return all(name.isdecimal() for name in names)


def named(path: str, before: Sequence[str]) -> tuple[str, ...]:
    """The class names in a file, in the order of the labels that `before` names.

    A file that has the same names in another order is brought into theirs.

    Raises:
      FileNotFoundError, ValueError: as `class_names`; for another number of names; or
        for the name of one label in the place of another, among names that differ.
    """
    names = class_names(path)
    if are_numbers(before):
        return _warned(path, names)
    if len(names) != len(before):
        raise ValueError(
            f"{path} has {len(names)} class names and the labels {len(before)} "
            f"classes: give one name for each class, in the order of the labels "
            f"({shown(before)})"
        )
    place = {name.casefold(): i for i, name in enumerate(before)}
    places = [place.get(name.casefold()) for name in names]
    if {*places} == {*range(len(before))}:
        if places != [*range(len(before))]:
            log.info("%s: its names are matched to the labels of the same names", path)
        return tuple(names[places.index(i)] for i in range(len(before)))
    for i, at in enumerate(places):
        if at not in (None, i):
            raise ValueError(
                f"{path}: {names[i]!r} is in place {i + 1}, but is the name of label "
                f"{at + 1}: give the names in the order of the labels "
                f"({shown(before)})"
            )
    return _warned(path, names)


def matched(learned: Task, names: Sequence[str], name: str) -> np.ndarray:
    """The labels of one set `[m]`, numbered by the class names of another.

    Args:
      learned: the set that a probe learns from.
      names: of the set that it is tested on.
      name: of the evaluation, for the error.

    Raises:
      ValueError: if the two sets of names differ.
    """
    lacking = [x for x in names if x not in learned.class_names]
    more = [x for x in learned.class_names if x not in names]
    if lacking or more:
        sides = (("train_source", lacking), ("source", more))
        differ = [f"{side} lacks {shown(own)}" for side, own in sides if own]
        raise ValueError(
            f"{name!r} needs the same classes in both sets, but "
            f"{' and '.join(differ)}; train_source is data.train unless you set "
            f"eval.tasks.{name}.train_source"
        )
    number = np.array([names.index(x) for x in learned.class_names], np.int32)
    return np.where(learned.labels >= 0, number[learned.labels], -1)


def shown(names: Sequence[str], most: int = 8) -> str:
    """Names for a message."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _warned(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    # In CLIP's list for ImageNet, two are "sunglasses"; their vectors are equal.
    if repeated := len(names) - len({*names}):
        log.warning(
            "%s: %d class names are repeated; the later class of each is never found",
            path,
            repeated,
        )
    return names
