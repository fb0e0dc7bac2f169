"""Draws docs/packing.png: the photographs of data/sample, packed into rows.

python docs/packing_figure.py
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import navit

ROW_TOKENS, PATCH = 1024, 16
ROOT = Path(__file__).parent.parent


def main() -> None:
    """Packs and draws."""
    files = sorted((ROOT / "data/sample").glob("*.*"))
    images = [f.read_bytes() for f in files if f.suffix in (".jpg", ".png", ".webp")]
    packed, index = navit.pack(
        images, max_tokens=256, row_tokens=ROW_TOKENS, max_upscale=1, return_index=True
    )
    rows = len(packed.segment_ids)
    figure = Figure(figsize=(10, 1.1 * rows + 0.6), layout="constrained")
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["tab20"].colors
    for row in range(rows):
        start = 0
        for slot, (height, width) in enumerate(packed.grids[row]):
            if not height:
                continue
            tokens = int(height * width)
            patches = packed.patches[row, start : start + tokens]
            picture = patches.reshape(height, width, PATCH, PATCH, 3)
            picture = picture.swapaxes(1, 2).reshape(height * PATCH, width * PATCH, 3)
            axes.add_patch(
                matplotlib.patches.Rectangle(
                    (start, row - 0.47),
                    tokens,
                    0.94,
                    facecolor=colors[index[row, slot] % 20],
                    edgecolor="white",
                )
            )
            _inset(axes, picture, start, tokens, row)
            if tokens > 60:
                label = f"{height}×{width}"
                axes.text(start + tokens / 2, row + 0.41, label, ha="center", size=7)
            start += tokens
    share = (packed.segment_ids > 0).mean()
    axes.set(xlim=(0, ROW_TOKENS), ylim=(rows - 0.5, -0.5))
    axes.set_yticks(range(rows), [f"row {r}" for r in range(rows)])
    axes.set_xlabel(
        f"{len(images)} photographs at most 256 tokens each, in {rows} rows of "
        f"{ROW_TOKENS}: {share:.1%} of the tokens are pixels, the white is padding"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("packing.png"), dpi=110)


def _inset(axes, picture: np.ndarray, start: int, tokens: int, row: int) -> None:
    """Draws a picture inside its stretch of the row, aspect kept."""
    aspect = picture.shape[1] / picture.shape[0]
    units = 118.0  # tokens that are as wide as a row is high
    height = min(0.68, 0.92 * tokens / units / aspect)
    width = height * aspect * units
    left, top = start + (tokens - width) / 2, row - 0.42
    extent = (left, left + width, top + height, top)
    axes.imshow(picture, extent=extent, aspect="auto", zorder=3)


if __name__ == "__main__":
    main()
