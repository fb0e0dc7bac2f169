"""Chooses a strategy for each kind of request: the choice as text and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from navit.compare.candidates import config_line, label, name_of
from navit.files import write_atomic
from navit.plan.strategies import Strategy
from navit.plan.strategies.choose import (
    Offer,
    Offers,
    Request,
    choose,
    hull,
    least,
    offers,
)
from navit.plan.strategies.measures import Tower


class Kind(NamedTuple):
    """A kind of request: its strategies, the best of them, and the one chosen."""

    requests: int
    offers: Offers
    hull: list[Offer]
    choice: Offer


class Family(NamedTuple):
    """What one family could do alone.

    `least` is None if it has no strategy for some kind, and the choice is None if the
    budget is too small.
    """

    least: int | None
    tokens: int | None
    detail: float | None


class Result(NamedTuple):
    tokens: int
    kinds: dict[str, Kind]
    families: dict[str, Family]


def decide(
    workload: Mapping[str, Sequence[Request]],
    strategies: Sequence[Strategy],
    tokens: int,
    *,
    tower: Tower,
) -> Result:
    """Chooses within a budget of tokens for the whole workload.

    Raises:
      ValueError: if a kind has no strategy that will do, or the budget is too small.
    """
    measured = {k: offers(x, strategies, tower=tower) for k, x in workload.items()}
    for kind, found in measured.items():
        if not found.usable:
            strategy, why = found.refused[-1]
            raise ValueError(
                f"none of {len(strategies)} candidates will do for {kind}: with "
                f"{label(strategy)}, for example, {why}; lower its scale, raise its "
                "limit, or name other candidates with --strategy"
            )
    hulls = {kind: hull(found.usable) for kind, found in measured.items()}
    chosen = choose(hulls, tokens)
    kinds = {
        kind: Kind(
            sum(request.number for request in workload[kind]),
            measured[kind],
            hulls[kind],
            chosen[kind],
        )
        for kind in workload
    }
    names = dict.fromkeys(name_of(strategy) for strategy in strategies)
    return Result(tokens, kinds, {x: _family(measured, x, tokens) for x in names})


def _family(measured: Mapping[str, Offers], name: str, tokens: int) -> Family:
    hulls = {
        kind: hull([x for x in found.usable if name_of(x.strategy) == name])
        for kind, found in measured.items()
    }
    if not all(hulls.values()):
        return Family(None, None, None)
    if least(hulls) > tokens:
        return Family(least(hulls), None, None)
    chosen = choose(hulls, tokens).values()
    return Family(
        least(hulls), sum(x.tokens for x in chosen), sum(x.detail for x in chosen)
    )


def table(result: Result) -> str:
    """The best candidates of each kind, the choice marked, totals, and settings."""
    every = [offer for kind in result.kinds.values() for offer in kind.hull]
    wide = max(len(label(offer.strategy)) for offer in every)
    text = ""
    for name, kind in result.kinds.items():
        text += f"{name}: {kind.requests:,} request" + "s" * (kind.requests > 1)
        text += f"\n  {'candidate':{wide}}  tokens/request  detail  encoder tokens"
        text += "        tokens  TFLOPs/request\n"
        for offer in kind.hull:
            mark = "*" if offer is kind.choice else " "
            n = kind.requests
            text += (
                f"{mark} {label(offer.strategy):{wide}}  {offer.tokens / n:14,.0f}  "
                f"{offer.detail / n:6.2f}  {offer.encoder_tokens / n:14,.0f}  "
                f"{offer.tokens:12,}  {offer.flops / n / 1e12:14.3f}\n"
            )
        others = len(kind.offers.usable) - len(kind.hull)
        text += (
            f"  {others} others give less detail per token; {len(kind.offers.refused)} "
            "miss the least scale, exceed the limit or refuse a size\n\n"
        )
    chosen = [kind.choice for kind in result.kinds.values()]
    requests = sum(kind.requests for kind in result.kinds.values())
    spent = sum(offer.tokens for offer in chosen)
    text += (
        f"tokens: {spent:,} of {result.tokens:,} ({spent / result.tokens:.1%}); "
        f"encoder tokens: {sum(x.encoder_tokens for x in chosen):,}; "
        f"mean detail: {sum(x.detail for x in chosen) / requests:.3f}\n\n"
    )
    for name, kind in result.kinds.items():
        text += f"{name}: {config_line(kind.choice.strategy)}\n"
    return text + "\n" + _families(result.families, requests)


def _families(families: Mapping[str, Family], requests: int) -> str:
    text = "one family for all kinds:\n"
    wide = max(map(len, families))
    order = sorted(
        families.items(), key=lambda x: (-(x[1].detail or 0), x[1].least or math.inf)
    )
    for name, family in order:
        if family.least is None:
            said = "has no candidate for some kind"
        elif family.tokens is None or family.detail is None:
            said = f"takes at least {family.least:,} tokens"
        else:
            mean = family.detail / requests
            said = f"mean detail {mean:.3f} with {family.tokens:,} tokens"
        text += f"  {name:{wide}}  {said}\n"
    return text


def plot(result: Result, path: Path) -> None:
    """Plots candidates by tokens and detail, with hulls and choices."""
    from matplotlib.figure import Figure  # slow to import, and only used here
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    count = len(result.kinds)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.3 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, kind) in zip(grid.flat, result.kinds.items(), strict=False):
        n = kind.requests
        for some, style in ((kind.offers.usable, "."), (kind.hull, ".-")):
            axes.plot(
                [x.tokens / n for x in some],
                [x.detail / n for x in some],
                style,
                color="#4477aa" if style == ".-" else "#bbbbbb",
                label="best per token" if style == ".-" else "candidate",
            )
        choice = kind.choice
        axes.plot(
            choice.tokens / n, choice.detail / n, "o", color="#d62728", label="choice"
        )
        axes.set(xscale="log", xlabel="tokens per request", ylim=(0, 1.05))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=7)
        axes.set_title(f"{name}: {n:,}\n{label(choice.strategy)}", size=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("detail (scale, at most 1)")
    grid[0, 0].legend(fontsize=7, loc="lower right", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
