"""Each published resolution strategy, restated one image at a time.

A rule takes (height, width) and the strategy's parameters, and gives its views, as
tuples (box, size, window, grid, role, place, fill), and the language model's tokens. It
is written from the papers and the projects that each rule names, and shares nothing
with `navit.strategies`. All pairs are (height, width) or (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from view_rules import (
    BLACK,
    CLIP_GREY,
    GREY,
    Pair,
    Shown,
    contained,
    cropped,
    grids,
    letterbox,
    overlap,
    roomiest,
    shown,
    sliced,
    squashed,
    tiles_of,
    upto,
)

Views = tuple[list[Shown], int]
LLAVA_NEXT = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


def square(
    height: int, width: int, size: int = 336, patch: int = 14, fit: str = "squash"
) -> Views:
    """CLIP's crop, SigLIP's squash and LLaVA-1.5's `expand2square`."""
    box, side = (0, 0, height, width), (size, size)
    if fit == "crop":
        view = cropped(box, size, patch, "whole")
    elif fit == "pad":
        longest = max(height, width)
        inner = tuple(max(1, round(x * size / longest)) for x in (height, width))
        top, left = (
            round((longest - x) // 2 * size / longest) for x in (height, width)
        )
        window = (-top, -left, size - top, size - left)
        view = shown(box, inner, window, patch, "whole", fill=CLIP_GREY)
    else:
        view = shown(box, side, (0, 0, *side), patch, "whole")
    return [view], (size // patch) ** 2


def anyres(
    height: int,
    width: int,
    tile: int = 336,
    patch: int = 14,
    canvases: Iterable[Pair] = LLAVA_NEXT,
    shrink_above: float | None = None,
) -> Views:
    """LLaVA-NeXT's anyres with unpadding; OneVision's if `shrink_above` is 9."""
    canvas = roomiest(height, width, list(canvases))
    across, down = canvas[1] / width, canvas[0] / height
    if across < down:
        size = (min(math.ceil(height * across), canvas[0]), canvas[1])
    else:
        size = (canvas[0], min(math.ceil(width * down), canvas[1]))
    start = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    box, side = (0, 0, height, width), tile // patch
    views = [shown(box, (tile, tile), (0, 0, tile, tile), patch, "thumbnail")]
    views += tiles_of(box, size, canvas, (tile, tile), patch, start, BLACK)

    rows, columns = (x // tile * side for x in canvas)
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        rows = len(range(cut, rows - cut))
    else:
        cut = (columns - int(width * (rows / height))) // 2
        columns = len(range(cut, columns - cut))
    if shrink_above is not None:
        times = math.sqrt(rows * columns / (shrink_above * side**2))
        if times > 1.1:
            rows, columns = int(rows // times), int(columns // times)
    return views, side**2 + rows * (columns + 1)


def lattice(tile: int, rows: int, columns: int) -> list[Pair]:
    """OneVision's canvases, 1x1 tiles to rows x columns; the width is outermost."""
    return [(r * tile, c * tile) for c in upto(columns) for r in upto(rows)]


def template(
    height: int,
    width: int,
    tile: int = 384,
    patch: int = 16,
    templates: Iterable[Pair] = ((1, 1), (1, 2), (2, 1), (2, 2)),
) -> Views:
    """Tiles of the nearest of few shapes by InternVL's comparison, then the whole."""
    views = squashed(height, width, tile, patch, list(templates))
    return views, len(views) * (tile // patch) ** 2


def internvl(
    height: int,
    width: int,
    tile: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
) -> Views:
    """InternVL's `dynamic_preprocess`; the tokens hold `<img>` and `</img>`."""
    views = squashed(height, width, tile, 14, grids(min_tiles, max_tiles), thumbnail)
    return views, len(views) * (tile // 28) ** 2 + 2


def deepseek_vl2(height: int, width: int, tile: int = 384, max_tiles: int = 9) -> Views:
    """DeepSeek-VL2's processor, with `PIL.ImageOps.pad` for both kinds of view."""
    canvases = [(r * tile, c * tile) for r, c in grids(1, max_tiles)]
    canvas = roomiest(height, width, canvases)
    views = [letterbox(height, width, tile, 14, "thumbnail")]
    size, start = contained(height, width, canvas)
    box = (0, 0, height, width)
    views += tiles_of(box, size, canvas, (tile, tile), 14, start, GREY)
    rows, columns = (x // tile for x in canvas)
    side = math.ceil(tile // 14 / 2)
    separators = side * (1 + rows) + 1
    return views, side**2 * (1 + rows * columns) + separators


def deepseek_ocr(
    height: int,
    width: int,
    mode: str = "gundam",
    base: int = 1024,
    tile: int = 640,
    max_tiles: int = 6,
) -> Views:
    """DeepSeek-OCR's modes, the base before the tiles; a newline ends each row."""
    sides = {"tiny": 512, "small": 640, "base": 1024, "large": 1280, "gundam": base}
    side = sides[mode]
    count = math.ceil(side // 16 / 4)
    tokens = count * (count + 1) + 1
    if mode in ("tiny", "small"):
        return square(height, width, side, 16)[0], tokens
    if mode != "gundam" or max(height, width) <= 640:
        return [letterbox(height, width, side, 16, "whole")], tokens
    tiles = squashed(height, width, tile, 16, grids(2, max_tiles), thumbnail=False)
    rows, columns = (x + 1 for x in tiles[-1][5])
    count = math.ceil(tile // 16 / 4)
    views = [letterbox(height, width, side, 16, "thumbnail"), *tiles]
    return views, tokens + rows * count * (columns * count + 1)


def llava_uhd(height: int, width: int, tile: int = 336, max_slices: int = 6) -> Views:
    """LLaVA-UHD v1's slices, each with a separator, and then the overview."""
    slices, overview = sliced(height, width, tile, max_slices, math.floor)
    return [*slices, overview], 145 * len(slices) + 144


def minicpmv(height: int, width: int, tile: int = 448, max_slices: int = 9) -> Views:
    """MiniCPM-V's overview and then its slices; the tokens leave its tags out."""
    slices, overview = sliced(height, width, tile, max_slices, round)
    return [overview, *slices], 64 * (len(slices) + 1)


def ureader(
    height: int, width: int, tile: int = 224, max_cells: int = 20, queries: int = 64
) -> Views:
    """UReader's and DocOwl's `anchor_rank`, in the float32 and int64 of the original.

    Both sides have 11 cells at most.
    """
    anchors = [grid for grid in grids(1, max_cells) if max(grid) <= 11]
    cells = np.array(anchors, np.int64) * tile
    tall = (np.float32(height / width) * cells[:, 1].astype(np.float32)).astype(int)
    shape = overlap(cells, np.stack([tall, cells[:, 1]], 1))
    scores = shape * np.float32(100) + overlap(cells, np.array([[height, width]]))
    canvas = tuple(cells[scores.argmax()].tolist())
    box, side = (0, 0, height, width), (tile, tile)
    views = [shown(box, side, (0, 0, *side), 14, "thumbnail")]
    views += tiles_of(box, canvas, canvas, side, 14)
    return views, len(views) * (queries + 1)


def llava_mini(height: int, width: int, tile: int = 336, splits: int = 2) -> Views:
    """LLaVA-Mini's `split_image`, each part through CLIP's crop; one token in all."""
    tall, wide = height // splits, width // splits
    if not tall or not wide:
        raise ValueError("a part has no pixels")
    views = []
    for row in range(splits if splits > 1 else 0):
        for column in range(splits):
            corner = (row * tall, column * wide)
            box = (*corner, corner[0] + tall, corner[1] + wide)
            views.append(cropped(box, tile, 14, "tile", (row, column)))
    role = "thumbnail" if views else "whole"
    return [*views, cropped((0, 0, height, width), tile, 14, role)], 1


def qwen_vl(
    height: int,
    width: int,
    patch: int = 14,
    merge: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
) -> Views:
    """`smart_resize` of transformers; the tokens hold vision start and end."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError("longer than 200:1")
    unit = patch * merge
    size = [round(x / unit) * unit for x in (height, width)]
    if math.prod(size) > max_pixels:
        by = math.sqrt(height * width / max_pixels)
        size = [max(1, math.floor(x / by / unit)) * unit for x in (height, width)]
    elif math.prod(size) < min_pixels:
        by = math.sqrt(min_pixels / (height * width))
        size = [math.ceil(x * by / unit) * unit for x in (height, width)]
    window = (0, 0, *size)
    view = shown((0, 0, height, width), tuple(size), window, patch, "whole")
    return [view], math.prod(size) // unit**2 + 2


def kimi(height: int, width: int, patch: int = 14, max_tokens: int = 4096) -> Views:
    """Kimi-VL's rescaling and its zeros on the right and below."""
    size, count = (height, width), (height // patch) * (width // patch)
    if count > max_tokens:
        scale = math.sqrt(max_tokens / count)
        size = (int(height * scale), int(width * scale))
    canvas = tuple(math.ceil(x / (2 * patch)) * 2 * patch for x in size)
    if max(canvas) // patch >= 512:
        raise ValueError("512 patches or more on a side")
    box, window = (0, 0, height, width), (0, 0, *canvas)
    view = shown(box, size, window, patch, "whole", fill=BLACK)
    return [view], math.prod(canvas) // (2 * patch) ** 2


def pixtral(height: int, width: int, patch: int = 16, side: int = 1024) -> Views:
    """Pixtral's longest side, rounded down, and its patches, rounded up."""
    ratio = max(height / side, width / side, 1.0)
    grid = tuple(math.ceil(math.floor(x / ratio) / patch) for x in (height, width))
    if not all(grid):
        raise ValueError("nothing is left")
    size = (grid[0] * patch, grid[1] * patch)
    view = shown((0, 0, height, width), size, (0, 0, *size), patch, "whole")
    return [view], grid[0] * (grid[1] + 1)


def naflex(height: int, width: int, patch: int = 16, max_tokens: int = 256) -> Views:
    """SigLIP 2's largest scale at which the patches fit, by 24 halvings of [0, 100]."""
    low, high = 1e-6, 100.0
    grid = (1, 1)
    for _ in range(24):
        scale = (low + high) / 2
        sides = [max(1, math.ceil(x * scale / patch)) for x in (height, width)]
        if math.prod(sides) > max_tokens:
            high = scale
        else:
            low, grid = scale, tuple(sides)
    size = (grid[0] * patch, grid[1] * patch)
    view = shown((0, 0, height, width), size, (0, 0, *size), patch, "whole")
    return [view], math.prod(grid)
