"""What `navit index` prints about a source."""

from __future__ import annotations

import numpy as np

from navit.sources.source import Source

_QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
# Of more images, quantiles are those of about as many, evenly spaced.
_SAMPLE = 1_000_000


def describe(name: str, source: Source) -> str:
    """How many images, how many are left out, and how large they are."""
    sizes = source.sizes[:: max(1, len(source) // _SAMPLE)]
    height, width = np.asarray(sizes).T.astype(np.float64)
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
        parts = range(0, len(labels), _SAMPLE)
        count = sum(int((labels[i : i + _SAMPLE] >= 0).sum()) for i in parts)
        lines.append(f"  task {task}: {len(names)} classes, {count} images labelled")
    if len(sizes) < len(source):
        lines.append(f"  of {len(sizes)} images, evenly spaced:")
    lines.append("  " + "quantile".ljust(16) + _cells([f"{q} %" for q in _QUANTILES]))
    for row, (values, form) in rows.items():
        cells = [format(q, form) for q in np.percentile(values, _QUANTILES)]
        lines.append("  " + row.ljust(16) + _cells(cells))
    return "\n".join(lines)


def _cells(texts: list[str]) -> str:
    return "".join(text.rjust(8) for text in texts)
