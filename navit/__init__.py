"""Train and run NaViT / NaFlex vision encoders on packed batches of images of any size.

The names here are loaded when first used, so `import navit` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit.batch import Batch as Batch
    from navit.batch import PackedImages as PackedImages
    from navit.batch import PackedTokens as PackedTokens
    from navit.config import Config as Config
    from navit.embed import Embedder as Embedder
    from navit.input.pack_images import pack as pack
    from navit.input.pack_video import pack_video as pack_video
    from navit.input.pipeline import train_batches as train_batches
    from navit.input.unpack_images import unpack as unpack
    from navit.model.vision import Vision as Vision
    from navit.plan import strategies as strategies
    from navit.plan.geometry import grid_for as grid_for
    from navit.sources.kinds import open_source as open_source
    from navit.weights import load as load
    from navit.weights import save as save

__version__ = "0.1.0"

_HOMES = {
    "Batch": "navit.batch",
    "Config": "navit.config",
    "Embedder": "navit.embed",
    "PackedImages": "navit.batch",
    "PackedTokens": "navit.batch",
    "Vision": "navit.model.vision",
    "grid_for": "navit.plan.geometry",
    "load": "navit.weights",
    "open_source": "navit.sources.kinds",
    "pack": "navit.input.pack_images",
    "pack_video": "navit.input.pack_video",
    "save": "navit.weights",
    "strategies": "navit.plan.strategies",
    "train_batches": "navit.input.pipeline",
    "unpack": "navit.input.unpack_images",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'navit' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "strategies" else getattr(home, name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
