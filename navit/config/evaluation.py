"""The evaluation part of a configuration (`navit/config/experiment.py`)."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Literal

from navit.config.overrides import nearest, positive
from navit.config.sources import AnySource

Kind = Literal["zero_shot", "retrieval", "classification", "knn", "logistic"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
PROBES = ("knn", "logistic")


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One thing to measure, on one set of images.

    `kind`: zero-shot classification, retrieval, the accuracy of the model's own class
    logits, or a probe of frozen vectors (k nearest neighbours, logistic regression).
    None: the kind that the name says.
    `source`: the images; None means `data.eval`.
    `task`: which classification of the source; None means the one of this name, or
    else its first.
    `classes`, `prompts`: for zero-shot, files of class names and of templates
    (`navit/evals/prompts.py`); None means the source's names and `eval.prompts`. Names
    are in the order of the labels: words alphabetical, integers by value.
    `train_source`: the labelled images that a probe learns from; None means
    `data.train`. To split one folder, give its two parts by `split` and `holdout`.
    `max_images`: the most images, and the most that a probe learns from; None means
    `eval.max_images`.
    `k`: the number of nearest neighbours; all, if a probe learns from fewer. `c`: the
    inverse of the strength of regularisation in logistic regression.
    `per_class`: budgets.json also has the accuracy of each class, and its images.
    """

    name: str = ""
    kind: Kind | None = None
    source: AnySource | None = None
    task: str | None = None
    classes: str | None = None
    prompts: str | None = None
    train_source: AnySource | None = None
    max_images: int | None = None
    k: int = 20
    c: float = 1.0
    per_class: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(
                f"the name {self.name!r} of an evaluation must be of letters, digits, "
                '"_" and "-"'
            )
        if self.kind is None:
            if self.name not in KINDS:
                near = nearest(self.name, KINDS)
                raise ValueError(
                    f"the evaluation {self.name!r} needs a kind"
                    + (f" ({near})" if near else "")
                    + f": write {self.name}:KIND, one of {', '.join(KINDS)}"
                )
            object.__setattr__(self, "kind", self.name)
        for field, kinds in (
            ("classes", ("zero_shot",)),
            ("prompts", ("zero_shot",)),
            ("train_source", PROBES),
            ("per_class", ("zero_shot", "classification")),
        ):
            if getattr(self, field) not in (None, False) and self.kind not in kinds:
                raise ValueError(
                    f"{field} is for an evaluation of kind {' or '.join(kinds)}, and "
                    f"{self.name!r} is of kind {self.kind}: leave it out"
                )
        positive(self, "k", "c")
        if self.max_images is not None:
            positive(self, "max_images")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, at which token budgets, and when.

    `tasks`: what to measure. Empty: zero-shot accuracy on each classification of
    `data.eval`, and retrieval; and of a model that was trained to classify, the
    accuracy of its own class logits.
    `every`: evaluate every so many training steps too; None or 0: only at the end.
    `max_images`: the most images of a set.
    `batch_tokens`: tokens embedded at a time; lower it if memory is short. None:
    2048 on a CPU, whose cache holds no more (4096 is a tenth slower), else 16384.
    `prompts`: templates with one "{}" for the class name.
    `cache_gib`: the most disk space, in GiB, for kept vectors (`docs/evaluation.md`);
    None: no limit. What the present evaluation uses is kept in any case.
    """

    budgets: tuple[int, ...] = (256, 729, 1024)
    max_images: int | None = None
    batch_tokens: int | None = None
    prompts: tuple[str, ...] = ("{}",)
    tasks: tuple[EvalTask, ...] = ()
    every: int | None = None
    cache_gib: float | None = 10.0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_images", "cache_gib"):
            if getattr(self, name) is not None:
                positive(self, name)
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"eval.budgets needs positive numbers, not {self.budgets}")
        if not self.prompts or any(p.count("{}") != 1 for p in self.prompts):
            raise ValueError(f'eval.prompts need one "{{}}" each, not {self.prompts}')
        if self.every is not None and self.every < 0:
            raise ValueError(f"eval.every must be 0 or more, not {self.every}")
        names = [task.name for task in self.tasks]
        if len({*names}) < len(names):
            raise ValueError(f"eval.tasks={','.join(names)} must differ in their names")
