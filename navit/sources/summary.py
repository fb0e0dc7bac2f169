"""What `navit index` prints about a source."""

from __future__ import annotations

import numpy as np

from navit.sources.source import Source

_QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def describe(name: str, source: Source) -> str:
    """How many images, how many are left out, and how large they are."""
    height, width = source.sizes.T.astype(np.float64)
    rows = {
        "height": (height, ".0f"),
        "width": (width, ".0f"),
        "megapixels": (height * width / 1e6, ".3g"),
        "height / width": (height / width, ".3g"),
    }
    lines = [f"{name}: {len(source)} images, {source.left_out} unreadable"]
    if source.damaged:
        lines[0] += f", {source.damaged} damaged shards"
    for task, (names, labels) in source.tasks.items():
        count = int((labels >= 0).sum())
        lines.append(f"  task {task}: {len(names)} classes, {count} images labelled")
    lines.append("  " + "quantile".ljust(16) + _cells([f"{q} %" for q in _QUANTILES]))
    for row, (values, form) in rows.items():
        cells = [format(q, form) for q in np.percentile(values, _QUANTILES)]
        lines.append("  " + row.ljust(16) + _cells(cells))
    return "\n".join(lines)


def _cells(texts: list[str]) -> str:
    return "".join(text.rjust(8) for text in texts)
