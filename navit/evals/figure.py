"""The plot of results: accuracy against tokens, and against compute."""

from __future__ import annotations

import collections
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from navit.evals.row import Row, label, origin, series, step

# The metrics to draw, of those that a row has.
_DRAWN = ("accuracy", "image_to_text_r1", "text_to_image_r1")
_MARKERS = "osD^vP*X<>"
_DASHES = ((4, 2), (1, 1), (6, 2, 1, 2), (9, 2))
# Chances nearer than this would be written over one another.
_APART = 0.035


class _Line(NamedTuple):
    """One evaluation at several budgets: their rows, and the metric to draw."""

    title: str
    metric: str
    rows: list[Row]


def plot(rows: Sequence[Row], cascades: Sequence[Row]) -> bytes:
    """Rows of one step of one model, and their cascades, as a PNG.

    A line joins only results of the same images, labels and prompts. Its cascade has
    the same colour; of several, the last is drawn. Dotted lines are chance.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10.0, 5.0), layout="constrained")
    by_tokens, by_flops = figure.subplots(1, 2, sharey=True)
    colors: dict[str, Any] = {}
    lines = _lines(rows)
    for i, (title, metric, some) in enumerate(lines):
        # Later markers are smaller, so that equal results show all of theirs.
        style = {
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 9 - 5 * i / len(lines),
            "markerfacecolor": "none",
            "linewidth": 1.2,
        }
        values = [row["metrics"][metric] for row in some]
        budgets = [row["budget"] for row in some]
        (drawn,) = by_tokens.plot(budgets, values, label=title, **style)
        style["color"] = colors[series(some[0])] = drawn.get_color()
        by_flops.plot([row["flops_per_image"] / 1e9 for row in some], values, **style)
    latest = {series(x): x for x in cascades if series(x) in colors}
    dashes: dict[str, Any] = {}
    for key, cascade in latest.items():
        title = f"cascade {cascade['small']}→{cascade['large']}"
        if title not in dashes:
            dashes[title] = (0, _DASHES[len(dashes) % len(_DASHES)])
            by_flops.plot([], [], linestyle=dashes[title], color="grey", label=title)
        by_flops.plot(
            [flops / 1e9 for _, _, flops in cascade["points"]],
            [accuracy for _, accuracy, _ in cascade["points"]],
            linestyle=dashes[title],
            color=colors[key],
        )
    _draw_chance(lines, by_tokens, by_flops)
    budgets = sorted({row["budget"] for row in rows})
    by_tokens.set_xscale("log", base=2)
    by_tokens.set_xticks(budgets, [str(budget) for budget in budgets])
    by_tokens.set_xlabel("tokens an image may take")
    by_tokens.set_ylabel("accuracy or recall@1")
    by_tokens.set_ylim(0, 1.03)
    by_tokens.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    by_flops.set_xscale("log")
    by_flops.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_flops.xaxis.set_major_formatter("{x:g}")
    by_flops.set_xlabel("GFLOPs of the image tower, an image")
    for axes in (by_tokens, by_flops):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(_title(rows[0]))
    handles = [
        x for axes in (by_tokens, by_flops) for x in axes.get_legend_handles_labels()[0]
    ]
    longest = max((len(x.get_label()) for x in handles), default=0)
    columns = 3 if longest < 40 else 2
    figure.set_figheight(4 + 0.22 * -(-len(handles) // columns))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _lines(rows: Sequence[Row]) -> list[_Line]:
    """Each evaluation and metric; two of the same title have their data in it."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["budget"]):
        for metric in _DRAWN:
            if metric in row["metrics"]:
                groups.setdefault((series(row), metric), []).append(row)
    short = [_named(some[0], metric) for (_, metric), some in groups.items()]
    titles = [
        f"{title}, {origin(some[0])}" if short.count(title) > 1 else title
        for title, some in zip(short, groups.values(), strict=True)
    ]
    seen: collections.Counter[str] = collections.Counter()
    lines = []
    for title, ((_, metric), some) in zip(titles, groups.items(), strict=True):
        seen[title] += 1  # other settings, such as a smaller number of images
        number = f" ({seen[title]})" if seen[title] > 1 else ""
        lines.append(_Line(title + number, metric, some))
    return lines


def _named(row: Row, metric: str) -> str:
    short = {"accuracy": row["kind"].replace("_", "-")}.get(metric, label(metric))
    return short if row["set"] == row["kind"] else f"{row['set']}, {short}"


def _title(row: Row) -> str:
    model, at = row.get("model", "one checkpoint"), step(row)
    return model if at == "-" else f"{model}, step {at}"


def _draw_chance(lines: Sequence[_Line], *axes: Any) -> None:
    """A dotted line for each chance, with its value where there is room."""
    chances = sorted({round(x.rows[0]["chance"][x.metric], 3) for x in lines})
    last = -1.0
    for chance in chances:
        for each in axes:
            each.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        if chance - last < _APART:
            continue
        last = chance
        axes[0].text(
            0.01,
            chance,
            f"chance {chance:.1%}",
            transform=axes[0].get_yaxis_transform(),
            va="bottom",
            size=7,
            color="grey",
        )
