"""The results of a study over its seeds: a table and a plot."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from navit.config import Study


class Line(NamedTuple):
    """The accuracy of a config on one evaluation at one budget, over the seeds.

    `error`: the standard error of the mean; None for one seed. `images`: seen in
    training, on average. `seconds`: of training and evaluation, on average.
    """

    name: str
    flops: float
    set: str
    budget: int
    mean: float
    error: float | None
    seeds: int
    images: float
    seconds: float
    chance: float


def summarize(results: Sequence[dict[str, Any]]) -> list[Line]:
    """Takes what the runs of a study measured, as `study.run` returns it.

    Raises:
      ValueError: if none of them has an accuracy.
    """
    groups: dict[tuple, list[tuple[dict, dict]]] = {}
    for result in results:
        for row in result["rows"]:
            if "accuracy" in row["metrics"]:
                key = result["name"], result["target_flops"], row["set"], row["budget"]
                groups.setdefault(key, []).append((result, row))
    lines = []
    for key, members in groups.items():
        values = [row["metrics"]["accuracy"] for _, row in members]
        n = len(values)
        lines.append(
            Line(
                *key,
                mean=statistics.mean(values),
                error=statistics.stdev(values) / math.sqrt(n) if n > 1 else None,
                seeds=n,
                images=statistics.mean(result["images"] for result, _ in members),
                seconds=statistics.mean(result["seconds"] for result, _ in members),
                chance=members[0][1]["chance"]["accuracy"],
            )
        )
    if not lines:
        raise ValueError(
            "no evaluation of the study measures accuracy: give its configs eval.tasks "
            "of another kind than retrieval"
        )
    return lines


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """A row for each config and compute; a column for each set and budget."""
    columns = list(dict.fromkeys((line.set, line.budget) for line in lines))
    rows: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        rows.setdefault((line.name, line.flops), []).append(line)
    header = ["config", "TFLOPs", "images seen", *(f"{s} at {b}" for s, b in columns)]
    table = [header, ["---"] * len(header)]
    for (name, flops), own in rows.items():
        cells = {(line.set, line.budget): _cell(line) for line in own}
        table.append(
            [name, f"{flops / 1e12:.3g}", f"{own[0].images:,.0f}"]
            + [cells.get(column, "-") for column in columns]
        )
    chance = ", ".join(
        f"{name} {value:.1%}"
        for name, value in {x.set: x.chance for x in lines}.items()
    )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return (
        f"# {study.title}\n\n{text}\n\n"
        f"Accuracy: mean ± standard error over {lines[0].seeds} seeds. "
        f"Chance: {chance}.\n"
    )


def plot(study: Study, lines: Sequence[Line]) -> bytes:
    """A PNG: accuracy against the budget, or against FLOPs if there are several.

    Bars are standard errors of the mean over the seeds.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    by_flops = len(study.flops) > 1
    sets = study.panels or tuple(dict.fromkeys(line.set for line in lines))
    budgets = study.budgets or tuple(sorted({line.budget for line in lines}))
    panels = [(s, b) for s in sets for b in (budgets if by_flops else (None,))]
    figure = Figure(figsize=(3.6 * len(panels) + 0.8, 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (name, budget) in zip(grid[0], panels, strict=True):
        own = [x for x in lines if x.set == name and budget in (None, x.budget)]
        for config in study.configs:
            points = sorted(
                (x.flops if by_flops else x.budget, 100 * x.mean, 100 * (x.error or 0))
                for x in own
                if x.name == config
            )
            if points:
                x, y, error = zip(*points, strict=True)
                axes.errorbar(x, y, error, fmt="o-", capsize=3, ms=4, label=config)
        axes.set_xscale("log", base=2)
        ticks = sorted({x.flops if by_flops else x.budget for x in own})
        axes.set_xticks(ticks, [f"{x / 1e12:g}" if by_flops else f"{x}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel("training TFLOPs" if by_flops else "tokens an image may take")
        axes.set_title(f"{name} at {budget} tokens" if by_flops else name, fontsize=10)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("accuracy, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _cell(line: Line) -> str:
    error = "" if line.error is None else f" ± {line.error * 100:.1f}"
    return f"{line.mean * 100:.1f}{error} %"
