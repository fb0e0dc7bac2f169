"""What a row of the table has besides its metrics, and the rows of cascades."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.config import AnySource, Config, Folder, Mixture
from navit.embed_batches import grids_of
from navit.evals import vectors
from navit.evals.accuracy import Confidences
from navit.evals.cascade import cascade
from navit.evals.measured import Measured
from navit.evals.row import Row
from navit.evals.tasks import Opened
from navit.model import flops
from navit.plan import geometry
from navit.plan.strategies import Strategy, View
from navit.sources.source import Source

# What a cascade has from the rows that it is made of.
_SAME = "step model weights set kind images data settings source classes prompts date"


class ByViews(NamedTuple):
    """What a strategy makes of images: totals over all of them.

    Attributes:
      longest: the most tokens of an image.
      enlarged: images of which a view is enlarged.
      refused: images that have no views.
    """

    views: int
    tokens: int
    squares: int
    longest: int
    enlarged: int
    refused: int


def by_views(strategy: Strategy, sizes: np.ndarray) -> ByViews:
    """Counts the views of images with these sizes, `[m, 2]`, and their tokens."""
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    each = [_of_size(strategy, *size) for size in distinct.tolist()]
    total = counts @ np.array(each, np.int64).reshape(-1, len(ByViews._fields))
    longest = max((one.longest for one in each), default=1)
    return ByViews(*total.tolist())._replace(longest=longest)


@functools.lru_cache(2**16)
def _of_size(strategy: Strategy, height: int, width: int) -> ByViews:
    try:
        views = strategy.views(height, width)
    except ValueError:
        return ByViews(0, 0, 0, longest=1, enlarged=0, refused=1)
    tokens = [view.grid[0] * view.grid[1] for view in views]
    squares = sum(n * n for n in tokens)
    total = sum(tokens)
    return ByViews(len(views), total, squares, total, _enlarges(views), 0)


def _enlarges(views: Sequence[View]) -> bool:
    return any(
        view.size[0] * view.size[1]
        > (view.box[2] - view.box[0]) * (view.box[3] - view.box[1])
        for view in views
    )


def cost(config: Config, sizes: np.ndarray, budget: int) -> dict[str, Any]:
    """The tokens and FLOPs of an image, and the share of the images that is enlarged.

    An image is enlarged if it has more tokens than its own pixels fill.
    """
    vision_only = dataclasses.replace(config.model, text=None)
    if config.data.strategy is not None:
        made = by_views(config.data.strategy, sizes)
        images = max(1, len(sizes) - made.refused)
        counts = flops.Counts(made.tokens, made.squares, made.views)
        return {
            "tokens_per_image": round(made.tokens / images, 1),
            "enlarged": round(made.enlarged / images, 4),
            "flops_per_image": flops.forward(vision_only, counts).total // images,
        }
    grids = grids_of(config, sizes, budget)
    tokens = grids.prod(-1).astype(np.int64)
    native = geometry.grids_for(
        sizes,
        budget,
        patch_size=config.model.vision.patch_size,
        max_upscale=1.0,
    ).prod(-1)
    counts = flops.Counts(
        int(tokens.sum()),
        int((tokens**2).sum()),
        len(sizes),
        window_squares=flops.window_squares(config.model, grids),
    )
    return {
        "tokens_per_image": round(float(tokens.mean()), 1),
        "enlarged": round(float((tokens > native).mean()), 4),
        "flops_per_image": flops.forward(vision_only, counts).total // len(sizes),
    }


def row(
    config: Config,
    each: Opened,
    measured: Measured,
    held: dict[Source, vectors.Vectors],
    budget: int,
) -> Row:
    """What was measured at a budget, on which images, and at what cost.

    An image is unreadable if its header or its pixels are.

    Args:
      held: the vectors of each source.
    """
    source, count = each.images
    metrics = measured.metrics
    # Images without a readable header are not among those of the source.
    left_out = source.left_out if count == len(source) else 0
    unreadable = int(np.isnan(held[source].pooled[:count, 0]).sum())
    made = {
        "set": each.task.name,
        "kind": each.task.kind,
        "images": count + left_out,
        "unreadable": unreadable + left_out,
        **cost(config, source.sizes[:count], budget),
        "images_per_second": held[source].per_second,
        "metrics": {x.name: round(x.value, 4) for x in metrics},
        "chance": {x.name: round(x.chance, 4) for x in metrics if x.chance is not None},
        "measured": {x.name: x.of for x in metrics},
        "data": source.fingerprint(),
        **_named(config, each),
        "settings": settings(config, each),
    }
    if measured.per_class is not None:
        made["per_class"] = {
            name: {"accuracy": round(x.accuracy, 4), "images": x.images}
            for name, x in measured.per_class.items()
        }
    return made


def _named(config: Config, each: Opened) -> dict[str, str]:
    """What the user calls the images, the class names and the prompts."""
    train, source = config.data.train, each.task.source or config.data.eval
    if isinstance(source, Folder) and not source.path and isinstance(train, Folder):
        source = dataclasses.replace(source, path=train.path)
    named = {"source": _source_text(source or train)}
    if each.task.classes is not None:
        named["classes"] = Path(each.task.classes).name
    if each.task.prompts is not None:
        named["prompts"] = Path(each.task.prompts).name
    elif each.prompts and each.prompts != ("{}",):
        more = f" and {len(each.prompts) - 1} more" if len(each.prompts) > 1 else ""
        named["prompts"] = f"{each.prompts[0]!r}{more}"
    return named


def _source_text(source: AnySource) -> str:
    """A source as on a command line: folder:~/pets split=eval."""
    if isinstance(source, Mixture):
        return " + ".join(map(_source_text, source.sources))
    first, *others = dataclasses.fields(source)
    changed = [
        f"{x.name}={getattr(source, x.name)}"
        for x in others
        if getattr(source, x.name) != x.default
    ]
    return " ".join([f"{source.short}:{getattr(source, first.name)}", *changed])


def notes(each: Opened) -> list[str]:
    """What a reader must know of an evaluation, whatever the budget."""
    lines, prompts, damaged = [], len(each.prompts), each.images.source.damaged
    if prompts > 1:
        lines.append(f"{prompts} prompts for each class")
    if each.fewer is not None:
        lines.append(
            f"k={each.fewer} in place of eval.tasks.{each.task.name}.k={each.task.k}: "
            f"there are {each.fewer} labelled images to learn from"
        )
    if damaged:
        lines.append(
            f"{damaged} file{'s' * (damaged > 1)} of the data damaged, and used only "
            "up to the damage"
        )
    return lines


def texts(each: Opened) -> str:
    """A digest of class names and prompts, which are from files; else empty."""
    if each.labels is None:
        return ""
    return f" ({_digest([each.labels.class_names, each.prompts])})"


def settings(config: Config, each: Opened) -> dict[str, Any]:
    """What else a result depends on."""
    depends_on: dict[str, Any] = vectors.settings(config)
    depends_on["files"] = _digest(each.images.source.version())
    if each.labels is not None:
        labels = each.labels.labels[: each.images.limit].tolist()
        depends_on["labels"] = _digest([each.labels.class_names, labels])
    if each.task.kind == "zero_shot":
        depends_on["prompts"] = _digest(each.prompts)
    if each.task.kind in ("zero_shot", "retrieval"):
        depends_on["tokenizer"] = _tokenizer(config)
    if each.train is not None:
        source, count = each.train[0]
        depends_on |= {"k": each.task.k, "c": each.task.c}
        depends_on |= {"train": source.fingerprint(), "train_images": count}
    return depends_on


def _tokenizer(config: Config) -> str | None:
    """Changes with the tokenizer, wherever its file is."""
    tokenizer = config.model.text.tokenizer if config.model.text else None
    if tokenizer is None or tokenizer == "bytes":
        return tokenizer
    content = Path(tokenizer).expanduser().read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def cascades(
    opened: Sequence[Opened],
    rows: Sequence[Sequence[Row]],
    confidences: dict[int, list[Confidences | None]],
) -> list[Row]:
    """From the smallest to the largest budget, of every evaluation of class scores."""
    small, large = min(confidences), max(confidences)
    curves = []
    for i in range(len(opened)):
        a, b = confidences[small][i], confidences[large][i]
        if small == large or a is None or b is None:
            continue
        _, first, second = np.intersect1d(a.places, b.places, return_indices=True)
        if not len(first):
            continue
        one, other = (
            next(row for row in rows[i] if row["budget"] == budget)
            for budget in (small, large)
        )
        points = cascade(
            a.probabilities[first],
            b.probabilities[second],
            a.labels[first],
            small_flops=one["flops_per_image"],
            large_flops=other["flops_per_image"],
        )
        curves.append(
            {name: other[name] for name in _SAME.split() if name in other}
            | {"small": small, "large": large}
            | {"points": [tuple(round(x, 4) for x in point) for point in points]}
        )
    return curves
