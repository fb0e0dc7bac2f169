"""One checkpoint at many token budgets: one table, one plot."""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

import navit
from navit.config import Config
from navit.embed import Embedder
from navit.embed_batches import check_budget, grids_of
from navit.embed_views import checked_views
from navit.evals import notes, results, row_parts, tables, vector_cache, vectors
from navit.evals.accuracy import Confidences
from navit.evals.figure import plot
from navit.evals.measured import measure
from navit.evals.row import Row
from navit.evals.tasks import Opened
from navit.files import write_atomic
from navit.sources.source import Source

log = logging.getLogger("navit")


class Results(NamedTuple):
    """Rows, one for each evaluation and budget, and cascades; see `row.Row`."""

    rows: list[Row]
    cascades: list[Row]


def run(
    embedder: Embedder,
    config: Config,
    opened: Sequence[Opened],
    out: Path,
    *,
    trained: Config | None = None,
    cache: Path | None = None,
    name: str | None = None,
) -> Results:
    """Evaluates at `config.eval.budgets`, prints the results and adds them to `out`.

    Writes budgets.json, .md, .csv and .png. In a table that is there, only the same
    evaluations are replaced.

    Args:
      out: the folder to write to.
      trained, cache: as in `evaluate`.
      name: of the weights; None: that of `out`.
    """
    name = name or out.resolve().name
    new = evaluate(embedder, config, opened, trained=trained, cache=cache, name=name)
    at = f", step {embedder.step}" if embedder.step else ""
    log.info("%s%s\n%s", name, at, tables.text(*new))
    if jax.process_index() == 0:
        pages_at = functools.partial(notes.pages, config)
        rows, cascades = results.write(out, *new, pages_at)
        latest = [new.rows[0][name] for name in ("step", "weights")]

        def drawn(some: list[Row]) -> list[Row]:
            return [x for x in some if [x["step"], x.get("weights")] == latest]

        write_atomic(out / "budgets.png", plot(drawn(rows), drawn(cascades)))
        log.info("wrote budgets.json, .md, .csv and .png to %s", out)
    return new


def evaluate(
    embedder: Embedder,
    config: Config,
    opened: Sequence[Opened],
    *,
    trained: Config | None = None,
    cache: Path | None = None,
    name: str = "one checkpoint",
) -> Results:
    """Measures each evaluation at each budget.

    A model of one resolution (`fixed_grid`) is evaluated once, at its own tokens; with
    `data.strategy`, once by its rule; the budget is the tokens of the longest image.

    Args:
      opened: what to measure, from `navit.evals.tasks.open_tasks`.
      trained: the config that the weights were trained with, if it is another.
      cache: the folder in which vectors are kept; None keeps none.
      name: of the weights, for people.

    Raises:
      ValueError: for a budget beyond the model's position table.
    """
    evaluators = [each.evaluator(embedder) for each in opened]
    counts: dict[Source, int] = {}
    for each in opened:
        for source, count in (each.images, *([each.train[0]] if each.train else [])):
            counts[source] = max(count, counts.get(source, 0))
    weights = vectors.fingerprint(embedder)
    budgets = budgets_of(config, counts)
    if {*budgets} != {*config.eval.budgets}:
        log.info(
            "this model takes %s, so it is evaluated once, not at each of "
            "eval.budgets=%s%s",
            f"views by {notes.strategy_of(config)}"
            if config.data.strategy
            else f"every image at {budgets[0]} tokens",
            ",".join(map(str, config.eval.budgets)),
            " (navit eval --budgets does)" if config.data.strategy else "",
        )
    folders: dict[tuple[Source, int], Path] = {}
    if cache is not None:
        for budget in budgets:
            for source in counts:
                folders[source, budget] = vectors.folder_of(
                    embedder, source, budget, weights=weights, cache=cache
                )
    rows: list[list[Row]] = [[] for _ in opened]
    written = 0
    confidences: dict[int, list[Confidences | None]] = {}
    named: set[tuple[Source, int]] = set()
    for budget in budgets:
        held = {}
        for source, count in counts.items():
            embedded = held[source] = vectors.embed(
                embedder, source, count, budget, folder=folders.get((source, budget))
            )
            for index, error in embedded.errors:
                if (source, index) not in named:  # once, not at every budget
                    named.add((source, index))
                    log.warning("not evaluated: %s (%s)", source.name(index), error)
            written += embedded.written
        about = notes.notes(config, trained or config, budget, step=embedder.step)
        confidences[budget] = []
        for each, evaluator, own in zip(opened, evaluators, rows, strict=True):
            measured = measure(each, evaluator, held)
            confidences[budget].append(measured.confidences)
            own.append(
                {
                    "step": embedder.step,
                    "model": name,
                    "weights": weights,
                    "budget": budget,
                    "strategy": notes.strategy_of(config),
                    **row_parts.row(config, each, measured, held, budget),
                    "notes": [*about, *row_parts.notes(each)],
                    "date": datetime.date.today().isoformat(),
                    "navit": navit.__version__,
                }
            )
    if written:
        log.info("kept %s of vectors in %s", vector_cache.size_text(written), cache)
    if cache is not None and jax.process_index() == 0:
        vector_cache.evict(cache, folders.values(), config.eval.cache_gib)
    cascades = row_parts.cascades(opened, rows, confidences)
    return Results([row for own in rows for row in own], cascades)


def budgets_of(
    config: Config, counts: Mapping[Source, int] | None = None
) -> tuple[int, ...]:
    """The budgets to evaluate at, each once; a model of one resolution has only one.

    With `data.strategy`, the tokens of the longest of the first `counts[source]` images
    of each source; without counts, none.
    """
    vision = config.model.vision
    if config.data.strategy is not None:
        longest = [
            row_parts.by_views(config.data.strategy, source.sizes[:count]).longest
            for source, count in (counts or {}).items()
        ]
        return (max(longest),) if longest else ()
    if vision.fixed_grid:
        return (vision.position.size**2,)
    return tuple(dict.fromkeys(config.eval.budgets))


def describe(opened: Sequence[Opened]) -> str:
    """The evaluations and their data; all processes must have the same."""
    return "; ".join(
        f"{each.task.name}{row_parts.texts(each)} of {source.fingerprint()}"
        for each in opened
        for source, _ in (each.images, *([each.train[0]] if each.train else []))
    )


def check_memory(config: Config) -> None:
    """Finds, before any data is read, a budget that needs more memory than is free.

    `check` looks again when the number of images is known.

    Raises:
      ValueError: for such a budget.
    """
    for budget in budgets_of(config):
        check_budget(config, budget)


def check(
    config: Config,
    opened: Sequence[Opened],
    train: Source | None = None,
) -> None:
    """Checks, before training or embedding, that an evaluation can run.

    Args:
      train: the training data, if the model is still to be trained on them.

    Raises:
      ValueError: if a budget exceeds the position table or this host's memory, or the
        model and the data have different classes.
    """
    vision = config.model.vision
    used = [each.images for each in opened]
    used += [each.train[0] for each in opened if each.train]
    if config.data.strategy is not None:
        for source, count in used:
            checked_views(config, source.sizes[:count], config.data.strategy)
    for budget in budgets_of(config):
        for source, count in used:
            vision.position.check(grids_of(config, source.sizes[:count], budget))
            check_budget(config, budget, count)
    if train is not None and config.train.needs("classifier"):
        labels = [each.labels for each in opened if each.task.kind == "classification"]
        tasks = [next(iter(train.tasks.values()), None), *labels]
        classes = [task.class_names if task else () for task in tasks]
        if len(classes[0]) != vision.num_classes or len({*classes}) > 1:
            raise ValueError(
                f"model.vision.num_classes={vision.num_classes}, data.train has "
                f"{len(classes[0])} classes and data.eval {len(classes[-1])}: all "
                "three must have the same classes"
            )
