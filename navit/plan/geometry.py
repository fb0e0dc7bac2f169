"""Image size and token budget -> grid of patches. Pure arithmetic."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

# Bounds and tolerance of the search for the scale, part of SigLIP 2's rule
# (big_vision, pp/proj/image_text/ops_naflex.py); other values give other grids.
_MIN_SCALE, _MAX_SCALE, _TOLERANCE = 1e-6, 100.0, 1e-5


def grid_for(
    height: int,
    width: int,
    *,
    patch_size: int = 16,
    max_tokens: int = 256,
    max_upscale: float | None = None,
) -> tuple[int, int]:
    """The (rows, columns) of patches that an image of this size is resized to.

    The largest scale at which both sides, each rounded up to whole patches, fit the
    budget (SigLIP 2 section 2.4.2), so small images are enlarged.

    Args:
      height, width: of the image, in pixels, at least 1.
      patch_size: side of a patch in pixels.
      max_tokens: the token budget; rows * columns never exceeds it.
      max_upscale: enlarge an image by this factor at most; None for no cap.

    Raises:
      TypeError: if a size is a text, or the budget not a whole number.
      ValueError: if a size or the budget is not positive.
    """
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, but should be a number: pass pixels")
    _check(float(height), float(width), max_tokens, patch_size, max_upscale)

    def patches(scale: float) -> tuple[int, int]:
        return (
            max(1, math.ceil(height * scale / patch_size)),
            max(1, math.ceil(width * scale / patch_size)),
        )

    low, high = _MIN_SCALE, _MAX_SCALE
    while high - low >= _TOLERANCE:
        middle = (low + high) / 2
        rows, columns = patches(middle)
        if rows * columns <= max_tokens:
            low = middle
        else:
            high = middle
    rows, columns = patches(low)
    if rows * columns > max_tokens:
        raise _too_long(float(height), float(width), max_tokens)
    return patches(low if max_upscale is None else min(low, max_upscale))


def grids_for(
    sizes: np.ndarray,
    max_tokens: np.ndarray | int,
    *,
    patch_size: int = 16,
    max_upscale: float | None = None,
) -> np.ndarray:
    """`grid_for` of many images at once: (height, width) `[m, 2]` -> int32 `[m, 2]`.

    Args:
      max_tokens: `[m]` token budget of each image, or one for all.
    """
    sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
    budget = np.broadcast_to(np.asarray(max_tokens), len(sizes))
    if len(sizes):
        height, width = sizes[sizes.min(-1).argmin()].tolist()
        _check(height, width, int(budget.min()), patch_size, max_upscale)

    sides = np.ascontiguousarray(sizes.T)

    def patches(scale: np.ndarray) -> np.ndarray:
        counts = sides * scale
        counts /= patch_size
        return np.maximum(1.0, np.ceil(counts, out=counts), out=counts)

    low = np.full(len(sizes), _MIN_SCALE)
    high = np.full(len(sizes), _MAX_SCALE)
    # All intervals have the same width and halve together, so each image is searched
    # step for step as in `grid_for`.
    while len(sizes) and high[0] - low[0] >= _TOLERANCE:
        middle = (low + high) / 2
        rows, columns = patches(middle)
        fits = rows * columns <= budget
        np.copyto(low, middle, where=fits)
        np.copyto(high, middle, where=~fits)
    over = patches(low).prod(0) > budget
    if over.any():
        height, width = sizes[over][0].tolist()
        raise _too_long(height, width, int(budget[over][0]))
    if max_upscale is not None:
        low = np.minimum(low, max_upscale)
    return np.ascontiguousarray(patches(low).T.astype(np.int32))


def check_count(name: str, value: Any) -> None:
    """Raises TypeError if a count is no whole number, and ValueError if it is below 1.

    Args:
      name: for the message.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} is {value!r}, but should be a whole number, such as 256"
        ) from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")


def _check(
    height: float,
    width: float,
    max_tokens: int,
    patch_size: int,
    max_upscale: float | None,
) -> None:
    if min(height, width) < 1:
        raise ValueError(f"an image of {height:g}x{width:g} pixels has no patches")
    check_count("max_tokens", max_tokens)
    if patch_size < 1 or (max_upscale is not None and max_upscale <= 0):
        raise ValueError(
            "patch_size and max_upscale must be positive, not "
            f"{patch_size} and {max_upscale}"
        )


def _too_long(height: float, width: float, max_tokens: int) -> ValueError:
    return ValueError(
        f"an image of {height:g}x{width:g} pixels does not fit in {max_tokens} tokens "
        f"at the smallest scale, {_MIN_SCALE:g}"
    )
