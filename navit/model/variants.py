"""Configs of the standard model sizes: Ti, S, B, L, So400m, g."""

from __future__ import annotations

from typing import Any

from navit.config import TextConfig, VisionConfig

# (width, depth, mlp_dim, num_heads), from big_vision's models/vit.py; "g" is SigLIP 2's
# g-opt.
_SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "g": (1536, 40, 6144, 16),
}


def vision(name: str, **overrides: Any) -> VisionConfig:
    """The image tower of a size and patch size, for example `vision("So400m/16")`."""
    size, _, patch = name.partition("/")
    if not patch.isdigit():
        raise ValueError(f'expected a size and a patch such as "B/16", not {name!r}')
    return VisionConfig(**{"patch_size": int(patch), **_tower(size), **overrides})


def text(name: str, **overrides: Any) -> TextConfig:
    """The text tower of a size, for example `text("B")`."""
    return TextConfig(**{**_tower(name), **overrides})


def _tower(size: str) -> dict[str, int]:
    if size not in _SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(_SIZES)}")
    names = ("width", "depth", "mlp_dim", "num_heads")
    return dict(zip(names, _SIZES[size], strict=True))
