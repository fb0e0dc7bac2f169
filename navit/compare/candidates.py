"""Strategies as text: `internvl:max_tiles=6`, and the candidates of each family."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from typing import Any

from navit.plan import strategies
from navit.plan.strategies import BY_NAME, AnyRes, Strategy


def parse(text: str, *, patch: int | None = None) -> list[Strategy]:
    """The strategies of `internvl:max_tiles=6,min_tiles=2,qwen`, in order.

    Args:
      patch: the patch of those that set none; None keeps the published ones.

    Raises:
      ValueError: for an unknown strategy or field, or a value that it refuses.
    """
    return [_built(name, fields, patch) for name, fields in _named(text)]


def parse_one(text: str, *, patch: int | None = None) -> Strategy:
    """As `parse`, of exactly one strategy."""
    found = parse(text, patch=patch)
    if len(found) > 1:
        raise ValueError(
            f"{text} names {len(found)} strategies: name one, such as {label(found[0])}"
        )
    return found[0]


def candidates(text: str | None, *, patch: int | None = None) -> list[Strategy]:
    """As `parse`, but a name without fields stands for a range of its settings.

    None stands for all families but LLaVA-Mini, whose one token costs thousands in the
    encoder.
    """
    if text is None:
        text = ",".join(name for name in _RANGES if name != "llava_mini")
    found = []
    for name, fields in _named(text):
        for setting in [fields] if fields else _RANGES.get(name, [{}]):
            found.append(_built(name, setting, patch))
    return found


def name_of(strategy: Strategy) -> str:
    """The name of the strategy's family."""
    return strategy.short


def label(strategy: Strategy) -> str:
    """The text that `parse` reads."""
    fields = ",".join(
        f"{name}={_grid(strategy, value) or _plain(value)}"
        for name, value in _changed(strategy)
    )
    return f"{name_of(strategy)}:{fields}" if fields else name_of(strategy)


def config_line(strategy: Strategy) -> str:
    """The overrides that set the strategy, as one types them in a shell."""
    values = {**dict(_changed(strategy)), "patch": strategy.patch}
    words = [f"data.strategy.{name}={_plain(value)}" for name, value in values.items()]
    return shlex.join([f"data.strategy={name_of(strategy)}", *words])


def _named(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names with their fields as text."""
    found: list[tuple[str, dict[str, str]]] = []
    for item in _items(text.replace(" ", "")):
        name, colon, field = item.partition(":")
        if colon or "=" not in item:
            found.append((name, {}))
        else:
            field = item
        if not found:
            raise ValueError(f"{item!r} sets a field of no strategy: begin with a name")
        key, equals, value = field.partition("=")
        if field and not equals:
            raise ValueError(
                f"{item!r} has no value: write {name}:FIELD=VALUE, for example "
                "internvl:max_tiles=6"
            )
        if field:
            found[-1][1][key] = value
    if not found:
        raise ValueError(f"no strategy: name one or more of {', '.join(BY_NAME)}")
    return found


def _items(text: str) -> list[str]:
    """What commas outside of parentheses separate."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    return [item for item in items if item]


def _built(name: str, fields: dict[str, Any], patch: int | None) -> Strategy:
    values = {key: _value(value) for key, value in fields.items()}
    if patch is not None:
        values.setdefault("patch", patch)
    grid = values.get("canvases")
    if name == "anyres" and isinstance(grid, str):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", grid):
            raise ValueError(
                f"anyres:canvases={grid} is neither ROWSxCOLUMNS, such as 3x3, nor "
                "pairs of pixels, such as ((672,336),(336,672))"
            )
        rows, columns = map(int, grid.split("x"))
        tile = values.get("tile", AnyRes.tile)
        values["canvases"] = AnyRes.grid(tile, rows, columns)
    try:
        return strategies.by_name(name, **values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return None if text == "none" else text


def _changed(strategy: Strategy) -> list[tuple[str, Any]]:
    """Fields with other values than their defaults."""
    found = []
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        if value != field.default:
            found.append((field.name, value))
    return found


def _grid(strategy: Strategy, value: Any) -> str | None:
    """ROWSxCOLUMNS of the canvases of `AnyRes.grid`; None for another value."""
    if not isinstance(strategy, AnyRes) or value != strategy.canvases:
        return None
    high, wide = value[-1]
    rows, columns = high // strategy.tile, wide // strategy.tile
    made = AnyRes.grid(strategy.tile, rows, columns)
    return f"{rows}x{columns}" if made == value else None


def _plain(value: Any) -> str:
    return str(value).replace(" ", "")


_RANGES: dict[str, list[dict[str, Any]]] = {
    "square": [{"size": x, "fit": "pad"} for x in (224, 336, 448, 672)],
    "anyres": [{}, {"canvases": "3x3"}, {"canvases": "6x6", "shrink_above": 9}],
    "template": [{}],
    "internvl": [{"max_tiles": x} for x in (1, 2, 4, 6, 9, 12, 24)],
    "deepseek_vl2": [{"max_tiles": x} for x in (1, 2, 4, 6, 9)],
    "deepseek_ocr": [{"mode": x} for x in ("tiny", "small", "base", "large", "gundam")],
    "llava_uhd": [{"max_slices": x} for x in (1, 2, 4, 6)],
    "minicpm_v": [{"max_slices": x} for x in (1, 2, 4, 6, 9)],
    "ureader": [{"max_cells": x} for x in (4, 8, 12, 20)],
    "llava_mini": [{"splits": x} for x in (1, 2)],
    "qwen": [
        {"max_pixels": 28 * 28 * x} for x in (64, 128, 256, 512, 1280, 2560, 5120)
    ],
    "kimi": [{"max_tokens": x} for x in (256, 512, 1024, 2048, 4096, 8192, 16384)],
    "naflex": [{"max_tokens": x} for x in (128, 256, 576, 784, 1024, 2048, 4096)],
}
