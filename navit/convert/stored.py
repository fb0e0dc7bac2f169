"""The common form of all formats: a config, and tensors under our names.

Tensors are read on demand, so a conversion keeps only one in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from navit.config import ModelConfig
from navit.model.two_tower import TwoTower
from navit.sharding import Rules, place_of


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model on disk.

    Attributes:
      model: its config, with the sizes in the file.
      get: our name of a tensor -> float32, all layers stacked; `read` also checks it.
      where: what it was read from, for messages.
      files: its tokenizer files.
    """

    model: ModelConfig
    get: Callable[[str], np.ndarray]
    where: str
    files: tuple[Path, ...] = ()

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


class Tensor(NamedTuple):
    """How one of our tensors is stored elsewhere.

    Attributes:
      ours: our name; a tensor of the blocks stacks all layers.
      theirs: the stored name; "{}" stands for the layer's number.
      axes: "same" up to reshaping, "transpose" for a linear layer stored
        `[out, in]`, "conv" for a patch kernel stored `[out, channel, row, column]`.
      part: (index, count): which part of the stored first axis it is, if several of
        ours are stored as one.
    """

    ours: str
    theirs: str
    axes: str = "same"
    part: tuple[int, int] = (0, 1)


@functools.lru_cache(maxsize=8)
def shapes_of(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Our tensors' names and shapes for a config, without allocating them."""
    like = jax.eval_shape(lambda: TwoTower(model, rngs=nnx.Rngs(0)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(like)
    return MappingProxyType({name_of(path): leaf.shape for path, leaf in leaves})


def name_of(path: tuple) -> str:
    """A leaf's path as a dotted name: `vision.encoder.blocks.mlp.up.kernel`."""
    return jax.tree_util.keystr(path).removesuffix(".value").lstrip(".")


def to_ours(value: np.ndarray, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """Brings a stored tensor, or one layer of it, into our layout."""
    if axes == "transpose":
        value = value.T
    elif axes == "conv":
        value = value.transpose(2, 3, 1, 0)
    return value.reshape(shape)


def to_theirs(value: np.ndarray, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`, to the stored `shape`."""
    if axes == "transpose":
        value = value.T
    elif axes == "conv":
        out, channels, rows, columns = shape
        value = value.reshape(rows, columns, channels, out).transpose(3, 2, 0, 1)
    return np.ascontiguousarray(value.reshape(shape))


def layers_of(model: ModelConfig, ours: str) -> int | None:
    """How many layers a tensor stacks; None for one outside the blocks."""
    if ".blocks." not in ours:
        return None
    if ours.startswith("vision."):
        return model.vision.depth
    assert model.text is not None
    return model.text.depth


def is_buffer(name: str) -> bool:
    """Whether it is a buffer, not a weight, that older transformers saved."""
    return name.endswith(".position_ids")


def check_shapes(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
) -> None:
    """Raises ValueError for the first tensor that is missing, surplus or misshapen."""
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{path} lacks the tensor {name}")
        if stored[name] != shape:
            raise ValueError(
                f"{path}: {name} is {stored[name]}, but the other tensors make it "
                f"{shape}"
            )
    surplus = [n for n in stored if n not in expected and not is_buffer(n)]
    if surplus:
        raise ValueError(
            f"{path} has {len(surplus)} tensors that navit does not know, first "
            f"{surplus[0]}"
        )


def depth_of(stored: Iterable[str], pattern: str) -> int:
    """Counts the layers in the names that match `pattern`, whose `(\\d+)` is the layer.

    If a layer is missing, the tensors do not fit this depth.
    """
    matches = (re.match(pattern, name) for name in stored)
    return max(1, len({int(x[1]) for x in matches if x}))


def square_side(path: Path, name: str, positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"{path}: {name} has {positions} positions, which is not a square"
        )
    return side


def build(weights: Weights, model: ModelConfig, rules: Rules = Rules()) -> TwoTower:
    """Builds the model, loading one tensor at a time.

    Raises:
      ValueError: names a tensor that is not finite.
    """
    make = functools.partial(TwoTower, model, rules)
    like = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(weights.read(name_of(path)), place_of(x))

    return jax.tree_util.tree_map_with_path(place, like)
