"""One checkpoint at many token budgets: one table, one plot."""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import navit
from navit import config as config_lib
from navit.config import Config
from navit.embed import Embedder
from navit.embed_batches import check_budget, grids_of
from navit.evals.accuracy import Classification
from navit.evals.retrieval import Retrieval
from navit.evals.zero_shot import ZeroShot
from navit.files import write_atomic
from navit.sources.source import Source, Task
from navit.sources.stream import StreamSource

log = logging.getLogger("navit")


def run(
    embedder: Embedder,
    config: Config,
    source: Source,
    out: Path,
    *,
    tasks: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Evaluates at `config.eval.budgets`; prints a table, writes budgets.json and .png.

    A model of one resolution (`fixed_grid`) is evaluated once, at its own tokens.

    Args:
      config: gives the budgets and the prompts.
      source: the images to evaluate on.
      out: the folder to write to.
      tasks: which of the source's classification tasks to run; empty for all.

    Raises:
      ValueError: for a task that the source does not have, or a budget beyond the
        model's position table.
    """
    results = evaluate(embedder, config, source, tasks=tasks)
    results = {
        "step": embedder.step,
        "date": datetime.date.today().isoformat(),
        "navit": navit.__version__,
        "data": config_lib.to_json(config.data),
        **results,
    }
    log.info("%s", table(results))
    if jax.process_index() == 0:
        write_atomic(
            out / "budgets.json", (json.dumps(results, indent=2) + "\n").encode()
        )
        write_atomic(out / "budgets.png", plot(results))
        log.info("wrote %s and budgets.png beside it", out / "budgets.json")
    return results


def evaluate(
    embedder: Embedder, config: Config, source: Source, *, tasks: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Metrics by budget, and the metrics of guessing; see `run`."""
    count = _count(config, source)
    # Class logits need vectors before normalisation.
    of_pooled = _classifiers(embedder, config, source, tasks)
    of_unit = _comparisons(embedder, config, source, tasks)
    evaluators = [*of_pooled, *of_unit]
    chance = {k: v for e in evaluators for k, v in e.chance.items()}
    budgets = {}
    named: set[int] = set()
    chosen_budgets = _budgets(config)
    if chosen_budgets != config.eval.budgets:
        log.info(
            "this model takes every image at %d tokens: it is evaluated once, not at "
            "each of eval.budgets=%s",
            chosen_budgets[0],
            ",".join(map(str, config.eval.budgets)),
        )
    for budget in chosen_budgets:
        log.info("%d images at %d tokens", count, budget)
        start = time.perf_counter()
        images, errors = embedder.embed_source(
            source.record,
            source.sizes[:count],
            budget,
            normalized=not of_pooled,
            progress=jax.process_index() == 0,
        )
        seconds = time.perf_counter() - start
        for index, error in errors:
            if index not in named:  # once, not at every budget
                named.add(index)
                log.warning("not evaluated: %s (%s)", source.name(index), error)
        unreadable = ~images.any(-1)  # in any process: all have the same vectors
        images[unreadable] = np.nan
        metrics = {k: v for e in of_pooled for k, v in e.run(images)}
        if of_pooled and of_unit:
            lengths = np.linalg.norm(images, axis=-1, keepdims=True)
            images /= np.maximum(lengths, 1e-6)
        metrics |= {k: v for e in of_unit for k, v in e.run(images)}
        grids = grids_of(config, source.sizes[:count], budget)
        budgets[str(budget)] = {
            "tokens_per_image": round(float(grids.prod(-1).mean()), 1),
            "images_per_second": round(count / seconds, 2),
            "unreadable": int(unreadable.sum()),
            **{name: round(value, 4) for name, value in metrics.items()},
        }
    return {
        "images": count,
        "chance": {k: round(v, 4) for k, v in chance.items()},
        "budgets": budgets,
    }


def check_memory(config: Config) -> None:
    """Finds, before any data is read, a budget that needs more memory than is free.

    `check` looks again when the number of images is known.

    Raises:
      ValueError: for such a budget.
    """
    for budget in _budgets(config):
        check_budget(config, budget)


def check(config: Config, train: Source | StreamSource, evaluation: Source) -> None:
    """Checks before training that the evaluation after it can run.

    Raises:
      ValueError: if a budget exceeds the position table or this host's memory, or the
        model and the two sources have different classes.
    """
    vision = config.model.vision
    for budget in _budgets(config):
        vision.position.check(grids_of(config, evaluation.sizes, budget))
        check_budget(config, budget, _count(config, evaluation))
    if config.train.needs("classifier"):
        names = [next(iter(s.tasks.values()), None) for s in (train, evaluation)]
        classes = [task.class_names if task else () for task in names]
        if len(classes[0]) != vision.num_classes or classes[0] != classes[1]:
            raise ValueError(
                f"model.vision.num_classes={vision.num_classes}, data.train has "
                f"{len(classes[0])} classes and data.eval {len(classes[1])}: all three "
                "must have the same classes"
            )


def table(results: dict[str, Any]) -> str:
    """The results as text: a line per budget, and one for chance."""
    names = list(results["chance"])
    header = ["tokens", *(_label(name) for name in names)]
    lines = [
        [budget, *(_percent(metrics.get(name)) for name in names)]
        for budget, metrics in results["budgets"].items()
    ]
    lines.append(["chance", *(_percent(results["chance"][name]) for name in names)])
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    text = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *lines]
    ]
    lost = max(metrics["unreadable"] for metrics in results["budgets"].values())
    images = f"{results['images']} images" + (f", {lost} unreadable" if lost else "")
    return f"step {results['step']}, {images}\n" + "\n".join(text)


def plot(results: dict[str, Any]) -> bytes:
    """The results as a PNG: each metric against the token budget."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    budgets = sorted(results["budgets"], key=int)
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, chance in results["chance"].items():
        values = [results["budgets"][b].get(name, np.nan) for b in budgets]
        drawn = axes.plot([int(b) for b in budgets], values, "o-", label=_label(name))
        axes.axhline(chance, color=drawn[0].get_color(), linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(b) for b in budgets], budgets)
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens an image may take")
    axes.set_title(f"one checkpoint, step {results['step']} (dotted: chance)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _budgets(config: Config) -> tuple[int, ...]:
    """The budgets to evaluate at; a model of one resolution has only one."""
    vision = config.model.vision
    return (vision.position.size**2,) if vision.fixed_grid else config.eval.budgets


def _count(config: Config, source: Source) -> int:
    return min(len(source), config.eval.max_images or len(source))


def _classifiers(
    embedder: Embedder, config: Config, source: Source, tasks: tuple[str, ...]
) -> list[Classification]:
    """Evaluators of pooled vectors, if the model has a trained classifier."""
    if not config.train.needs("classifier"):
        return []
    name, task = next(iter(source.tasks.items()))
    if config.train.needs("text_tower"):  # zero-shot has the task's own name
        name = f"{name}_classifier"
    elif tasks and {*_choose(source.tasks, tasks)} != {name}:
        raise ValueError(f"this model classifies {name!r} only: leave out --task")
    return [Classification(embedder.classify, name, task)]


def _comparisons(
    embedder: Embedder, config: Config, source: Source, tasks: tuple[str, ...]
) -> list[Any]:
    """Evaluators of unit vectors, if the model has a trained text tower."""
    if not config.train.needs("text_tower"):
        return []
    captions = [source.record(i).captions for i in range(_count(config, source))]
    chosen = _choose(source.tasks, tasks)
    return [
        ZeroShot(embedder.embed_texts, chosen, config.eval.prompts),
        Retrieval(embedder.embed_texts, captions),
    ]


def _choose(tasks: dict[str, Task], names: tuple[str, ...]) -> dict[str, Task]:
    for name in names:
        if name not in tasks:
            known = ", ".join(tasks) or "none: its table has no label column"
            raise ValueError(f"the data has no task {name!r}; it has {known}")
    return {name: tasks[name] for name in names or tasks}


def _label(metric: str) -> str:
    metric = re.sub(r"_r(\d+)$", r" R@\1", metric.replace("_to_", "→"))
    return metric.replace("_accuracy", " acc.").replace("_top5", " top-5")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
