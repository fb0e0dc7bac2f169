"""The configured evaluations: their images, labels and captions, opened and checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from navit.config import AnySource, Config, EvalTask
from navit.config.evaluation import PROBES
from navit.embed import Embedder
from navit.evals import classes
from navit.evals.accuracy import Classification
from navit.evals.probes import Labelled, Probe, logistic_regression, nearest_neighbours
from navit.evals.prompts import load_templates
from navit.evals.retrieval import Retrieval
from navit.evals.zero_shot import zero_shot
from navit.input import pipeline
from navit.sources.kinds import Opener
from navit.sources.local_cache import open_cache
from navit.sources.source import Source, Task

log = logging.getLogger("navit")

Evaluator = Classification | Retrieval | Probe


class Images(NamedTuple):
    """The first `limit` images of a source."""

    source: Source
    limit: int


@dataclasses.dataclass(frozen=True)
class Opened:
    """An evaluation with its data.

    Attributes:
      images: what it measures on.
      labels: class names, and labels of all images of the source; retrieval has none.
      prompts: templates with one "{}" each; used by zero-shot.
      train: what a probe learns from, with their labels.
      fewer: the number of neighbours, where there are fewer than `task.k` labelled
        images to learn from.
    """

    task: EvalTask
    images: Images
    labels: Task | None = None
    prompts: tuple[str, ...] = ()
    train: tuple[Images, np.ndarray] | None = None
    fewer: int | None = None

    @functools.cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each image; some sources read the images for them."""
        source, limit = self.images
        return [source.record(i).captions for i in range(limit)]

    def evaluator(self, embedder: Embedder) -> Evaluator:
        """Embeds the texts, once for all budgets."""
        task, labels = self.task, self.labels
        if task.kind == "retrieval":
            return Retrieval(embedder.embed_texts, self.captions)
        assert labels is not None
        if task.kind == "zero_shot":
            return zero_shot(
                embedder.embed_texts, embedder.logits, labels, self.prompts
            )
        if task.kind == "classification":
            return Classification(embedder.classify, labels)
        assert self.train is not None
        predict: Any = (
            functools.partial(_neighbours, k=task.k)
            if task.kind == "knn"
            else functools.partial(logistic_regression, c=task.c)
        )
        return Probe(predict, labels, self.train[1])


def _neighbours(train: Labelled, vectors: np.ndarray, *, k: int) -> np.ndarray:
    """`nearest_neighbours` `[q]` of at most all that can be learned from."""
    return nearest_neighbours(train, vectors, k=min(k, len(train.labels)))


def open_tasks(
    config: Config,
    *,
    names: Sequence[str] = (),
    classes: str | None = None,
    prompts: str | None = None,
    opener: Opener | None = None,
) -> list[Opened]:
    """Opens what `config.eval` evaluates; each source is opened once.

    Args:
      names: which evaluations; empty for all. Without `eval.tasks`, they are
        "retrieval" and the classifications of `data.eval`.
      classes: a file of class names, for the only zero-shot classification.
      prompts: a file of templates, for each zero-shot classification without its own.
      opener: what has opened the training images, if they are open.

    Raises:
      FileNotFoundError, ValueError: for a name that does not exist, a missing file, or
        data that lack what an evaluation needs.
    """
    tasks_of = _Tasks(config, opener or Opener(cache=open_cache(config.data)))
    if config.eval.tasks:
        tasks = list(config.eval.tasks)
        check_names(names, [task.name for task in tasks], "eval.tasks")
        tasks = [task for task in tasks if not names or task.name in names]
    else:
        source = tasks_of.source(config.data.eval)
        tasks = _usual(config, source, names, named=classes is not None)
    some = [task for task in tasks if task.kind == "zero_shot"]
    if classes is not None:
        if len(some) != 1:
            known = ", ".join(task.name for task in some) or "none"
            raise ValueError(
                f"--classes {classes} names the classes of one zero-shot "
                f"classification, and there are {len(some)} ({known}): choose one with "
                "--task"
            )
        named = dataclasses.replace(some[0], classes=classes)
        tasks = [named if task is some[0] else task for task in tasks]
    if prompts is not None:
        if not some:
            raise ValueError(
                f"--prompts {prompts} is for zero-shot classification, and there is "
                "none: leave it out"
            )
        tasks = [
            dataclasses.replace(task, prompts=task.prompts or prompts)
            if task.kind == "zero_shot"
            else task
            for task in tasks
        ]
    for task in tasks:  # before the training images, which other probes read
        tasks_of.open_own(task)
    return [tasks_of.open(task) for task in tasks]


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises ValueError for a name that is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? It has" if near else "it has"
            raise ValueError(
                f"{where} has no task {name!r}; {hint} {', '.join(known) or 'none'}"
            )


def _usual(
    config: Config, source: Source, names: Sequence[str], *, named: bool
) -> list[EvalTask]:
    """The evaluations of a config that names none.

    Args:
      names: which of them; empty for all.
      named: whether class names are given beside the data.
    """
    tasks: list[EvalTask] = []
    if config.train.needs("classifier"):
        first = next(iter(source.tasks), None)
        if first is None:
            raise ValueError("data.eval has no labels, which this model's classes need")
        if not config.train.needs("text_tower") and {*names} - {first}:
            raise ValueError(f"this model classifies {first!r} only: leave out --task")
        tasks.append(EvalTask(first, "classification", task=first))
    if config.train.needs("text_tower"):
        known = [*source.tasks, "retrieval"]
        check_names(names, known, "data.eval")
        for name, task in source.tasks.items():
            if name in names or named or not classes.are_numbers(task.class_names):
                tasks.append(EvalTask(name, "zero_shot", task=name))
            else:
                log.warning("no zero-shot evaluation: %s", _nameless(name))
        tasks.append(EvalTask("retrieval"))
    return [task for task in tasks if not names or task.name in names]


def _nameless(name: str) -> str:
    return (
        f"the labels of {name!r} are integers without names: name the classes with "
        "--classes FILE, `classes` of the evaluation (eval.tasks) or of the data"
    )


class _Tasks:
    def __init__(self, config: Config, opener: Opener) -> None:
        self._config, self._opener = config, opener
        self._sources: dict[AnySource | None, Source] = {}

    def source(self, source: AnySource | None) -> Source:
        """A source to evaluate on."""
        if source not in self._sources:
            data = dataclasses.replace(self._config.data, eval=source)
            self._sources[source] = pipeline.open_eval_source(data, self._opener)
        return self._sources[source]

    def open_own(self, task: EvalTask) -> None:
        """Opens the sources that a task names itself, in case one is missing."""
        if task.source is not None:
            self.source(task.source)
        if task.train_source is not None:
            self._opener.open(task.train_source)

    def open(self, task: EvalTask) -> Opened:
        needs = self._config.train.needs
        if task.kind in ("zero_shot", "retrieval") and not needs("text_tower"):
            raise ValueError(
                f"{task.name!r} is of kind {task.kind}, which needs a trained text "
                "tower, and this model has none: measure classification, knn or "
                "logistic"
            )
        source = self.source(task.source or self._config.data.eval)
        images = self._images(task, source)
        if task.kind == "retrieval":
            return Opened(task, images)
        labels = self._labels(task, images)
        if task.kind == "classification":
            self._check_classifier(task, labels)
        if task.kind not in PROBES:
            prompts = self._config.eval.prompts
            if task.prompts is not None:
                prompts = load_templates(task.prompts)
            return Opened(task, images, labels, prompts)
        train, learned = self._train(task, images, labels)
        known = int((learned[: train.limit] >= 0).sum())
        fewer = known if task.kind == "knn" and known < task.k else None
        return Opened(task, images, labels, train=(train, learned), fewer=fewer)

    def _images(self, task: EvalTask, source: Source) -> Images:
        most = task.max_images or self._config.eval.max_images or len(source)
        return Images(source, min(len(source), most))

    def _labels(self, task: EvalTask, images: Images) -> Task:
        tasks = images.source.tasks
        if not tasks:
            raise ValueError(
                f"{task.name!r} is of kind {task.kind}, and its {len(images.source)} "
                "images have no labels: use data with a label column or field"
            )
        if task.task is not None:
            check_names([task.task], [*tasks], f"the data of {task.name!r}")
        named = task.name if task.name in tasks else next(iter(tasks))
        labels = tasks[task.task or named]
        if not (labels.labels[: images.limit] >= 0).any():
            raise ValueError(
                f"{task.name!r}: none of the {images.limit} images has a label: use "
                "labelled data, or raise max_images"
            )
        if task.classes is not None:
            names = classes.named(task.classes, labels.class_names)
            labels = Task(names, labels.labels)
        elif task.kind == "zero_shot" and classes.are_numbers(labels.class_names):
            raise ValueError(_nameless(task.name))
        return labels

    def _check_classifier(self, task: EvalTask, labels: Task) -> None:
        classes = self._config.model.vision.num_classes
        trained = self._config.train.needs("classifier")
        if not trained or classes != len(labels.class_names):
            raise ValueError(
                f"{task.name!r} is of kind classification and has "
                f"{len(labels.class_names)} classes, but the model has "
                f"model.vision.num_classes={classes if trained else 0}: train it with "
                f"{len(labels.class_names)}, or measure zero_shot, knn or logistic"
            )

    def _train(
        self, task: EvalTask, images: Images, labels: Task
    ) -> tuple[Images, np.ndarray]:
        """The images that a probe learns from, and their labels."""
        if task.kind == "logistic" and importlib.util.find_spec("sklearn") is None:
            raise ValueError(
                f"{task.name!r} is of kind logistic, which needs scikit-learn: pip "
                "install scikit-learn"
            )
        chosen = self._opener.open(task.train_source or self._config.data.train)
        train = self._images(task, chosen)
        if train.source.fingerprint() == images.source.fingerprint():
            raise ValueError(
                f"{task.name!r} would learn from the {len(images.source)} images that "
                "it is tested on: set train_source to others, such as split=train of "
                "a folder, with split=eval for source"
            )
        learned = self._labels(task, train)
        return train, classes.matched(learned, labels.class_names, task.name)
