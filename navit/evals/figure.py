"""The plot of results: accuracy against tokens, and against compute."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from navit.evals.results import Row, label

# The metrics to draw, of those that a row has.
_DRAWN = ("accuracy", "image_to_text_r1", "text_to_image_r1")


def plot(rows: Sequence[Row], cascades: Sequence[Row]) -> bytes:
    """Rows of one step, and their cascades, as a PNG. Dotted lines are chance."""
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    by_tokens, by_flops = figure.subplots(1, 2, sharey=True)
    colors: dict[tuple[str, str], Any] = {}
    for (name, kind, metric), line in _lines(rows).items():
        tokens, flops, values, chance = zip(*line, strict=True)
        short = {"accuracy": kind.replace("_", "-")}.get(metric, label(metric))
        title = short if name == kind else f"{name}, {short}"
        (drawn,) = by_tokens.plot(tokens, values, "o-", label=title)
        color = drawn.get_color()
        colors.setdefault((name, kind), color)
        by_flops.plot(flops, values, "o-", color=color)
        for axes in (by_tokens, by_flops):
            axes.axhline(chance[0], color=color, linewidth=0.8, linestyle=":")
    for cascade in cascades:
        _, values, flops = zip(*cascade["points"], strict=True)
        by_flops.plot(
            [x / 1e9 for x in flops],
            values,
            "--",
            color=colors[cascade["set"], cascade["kind"]],
            label=f"{cascade['set']}, cascade {cascade['small']}→{cascade['large']}",
        )
    budgets = sorted({row["budget"] for row in rows})
    by_tokens.set_xscale("log", base=2)
    by_tokens.set_xticks(budgets, [str(budget) for budget in budgets])
    by_tokens.minorticks_off()
    by_tokens.set_xlabel("tokens an image may take")
    by_tokens.set_ylim(0, 1.02)
    by_flops.set_xscale("log")
    by_flops.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_flops.xaxis.set_major_formatter("{x:g}")
    by_flops.minorticks_off()
    by_flops.set_xlabel("GFLOPs of the image tower, an image")
    for axes in (by_tokens, by_flops):
        axes.grid(alpha=0.3)
    figure.suptitle(f"one checkpoint, step {rows[0]['step']} (dotted: chance)")
    handles = [
        x for axes in (by_tokens, by_flops) for x in axes.get_legend_handles_labels()[0]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[tuple]]:
    """(tokens, GFLOPs, value, chance) at each budget, by set, kind and metric.

    If a point has several results, such as with other prompts, the last counts.
    """
    lines: dict[tuple[str, str, str], dict[int, tuple]] = {}
    for row in sorted(rows, key=lambda row: row["budget"]):
        for metric in _DRAWN:
            if metric in row["metrics"]:
                line = lines.setdefault((row["set"], row["kind"], metric), {})
                line[row["budget"]] = (
                    row["budget"],
                    row["flops_per_image"] / 1e9,
                    row["metrics"][metric],
                    row["chance"][metric],
                )
    return {key: list(line.values()) for key, line in lines.items()}
