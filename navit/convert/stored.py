"""A model on disk, whatever its format: a config, and tensors under our names.

Tensors are read on demand, so a conversion keeps only one in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx

from navit.config import ModelConfig, PositionConfig, VisionConfig
from navit.model.two_tower import TwoTower
from navit.plan.strategies import Strategy
from navit.sharding import Rules, place_of


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model on disk.

    Attributes:
      model: its config, with the sizes in the file.
      get: our name of a tensor -> float32, all layers stacked; `read` also checks it.
      where: what it was read from, for messages.
      files: its tokenizer files.
      strategy: how its images become patches; None is navit's own rule.
    """

    model: ModelConfig
    get: Callable[[str], np.ndarray]
    where: str
    files: tuple[Path, ...] = ()
    strategy: Strategy | None = None

    def read(self, name: str) -> np.ndarray:
        """A tensor by our name; raises ValueError if it is not finite."""
        value = self.get(name)
        wrong = value.size - np.count_nonzero(np.isfinite(value))
        if wrong:
            raise ValueError(
                f"{self.where}: {wrong} of the {value.size} values of {name} are NaN "
                "or infinite: get the file again, or take one from before its training "
                "diverged"
            )
        return value


@functools.lru_cache(maxsize=8)
def shapes_of(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Our tensors' names and shapes for a config, without allocating them."""
    like = jax.eval_shape(lambda: TwoTower(model, rngs=nnx.Rngs(0)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(like)
    return MappingProxyType({name_of(path): leaf.shape for path, leaf in leaves})


def name_of(path: tuple) -> str:
    """A leaf's path as a dotted name: `vision.encoder.blocks.mlp.up.kernel`."""
    return jax.tree_util.keystr(path).removesuffix(".value").lstrip(".")


def depth_of(stored: Iterable[str], pattern: str) -> int:
    """Counts the layers in the names that match `pattern`, whose `(\\d+)` is the layer.

    If a layer is missing, the tensors do not fit this depth.
    """
    matches = (re.match(pattern, name) for name in stored)
    return max(1, len({int(x[1]) for x in matches if x}))


def shape_of(
    path: Path, stored: Mapping[str, tuple[int, ...]], name: str, *axes: int
) -> tuple[int, ...]:
    """The shape of a stored tensor that has one of the given numbers of axes."""
    if name not in stored:
        raise ValueError(f"{path} lacks the tensor {name}")
    if len(stored[name]) not in axes:
        raise ValueError(
            f"{path}: {name} is {stored[name]}, but should have "
            f"{' or '.join(map(str, axes))} axes"
        )
    return stored[name]


# Settings of the image tower that SigLIP has only as they are by default.
_SIGLIP_HAS_NOT = (
    "rotary",
    "norm",
    "eps",
    "act",
    "gated",
    "patch_bias",
    "patch_frames",
    "mean",
    "std",
    "pre_norm",
    "final_norm",
    "pool_norm",
    "layer_scale",
    "registers",
    "window",
)


def check_expressible(
    model: ModelConfig, format: str, *, embed_dim: bool = False
) -> None:
    """Raises ValueError for a setting that SigLIP's formats lack.

    Args:
      format: its name, for the message.
      embed_dim: whether it has a projection of the pooled image.
    """
    v = model.vision
    wrong = {
        "text": model.text is None,
        "merger": model.merger is not None,
        "vision.position.kind": v.position.kind != "siglip2",
        "vision.pool": v.pool != "map",
        "vision.qk_norm": v.qk_norm,
        "vision.use_bias": not v.use_bias,
        "vision.embed_dim": v.embed_dim is not None and not embed_dim,
        "vision.num_classes": v.num_classes > 0,
    }
    for part, usual, names in (
        ("vision.position", PositionConfig, ("resize", "frame")),
        ("vision", VisionConfig, _SIGLIP_HAS_NOT),
    ):
        config = operator.attrgetter(part)(model)
        for name in names:
            changed = getattr(config, name) != getattr(usual, name)
            wrong[f"{part}.{name}"] = changed
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = operator.attrgetter(name)(model)
            raise ValueError(
                f"{format} does not support model.{name}={value!r}: write the format "
                "navit (--format navit), which has every setting"
            )


def square_side(path: Path, name: str, positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"{path}: {name} has {positions} positions, which is not a square"
        )
    return side


def build(
    weights: Weights, model: ModelConfig, rules: Rules = Rules(), *, seed: int = 0
) -> TwoTower:
    """Builds the model, loading one tensor at a time.

    Args:
      seed: for the text tower, if the weights have none.

    Raises:
      ValueError: names a tensor that is not finite.
    """
    make = functools.partial(TwoTower, model, rules)
    like = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    stored = shapes_of(weights.model)

    @jax.jit
    def initial() -> dict[str, jax.Array]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(make(rngs=nnx.Rngs(seed)))
        names = ((name_of(path), leaf) for path, leaf in leaves)
        return {name: leaf for name, leaf in names if name not in stored}

    new = initial() if shapes_of(model).keys() - stored.keys() else {}

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = name_of(path)
        if name in new:
            return new[name]
        return jax.device_put(weights.read(name), place_of(x))

    return jax.tree_util.tree_map_with_path(place, like)
