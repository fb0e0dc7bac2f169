"""Reads and writes a model's tensors by a table of how a format stores them.

A format is such a table, from `tensors.py`, and a file that knows its container.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from navit.config import ModelConfig
from navit.convert.stored import Weights, shapes_of

Table = list["Tensor"]
Shapes = Mapping[str, tuple[int, ...]]


class Tensor(NamedTuple):
    """How a format stores one of its tensors.

    Attributes:
      name: the stored name. "{}" stands for a layer's number, if the format stores each
        layer by itself; ours stack all layers on their first axis.
      ours: our names. Several of one shape are stored as one, joined on its first axis.
      axes: `"our axes -> stored axes"`, without that of the layers; None if they are
        the same; a tuple has those of each of `ours`. Parentheses join axes, `1` is an
        axis of size 1, and `~x` is axis x stored in reverse. `h` is the number of
        heads; `rows`, `columns`, `rgb` and `frames` are those of a patch; `xy` and
        `pair` have size 2: the two axes of an image, and the two channels that rotary
        positions turn together.
    """

    name: str
    ours: tuple[str, ...]
    axes: str | tuple[str | None, ...] | None = None

    @property
    def by_layer(self) -> bool:
        return "{}" in self.name


class _Layout(NamedTuple):
    """A tensor's way from our shape to the stored one and back.

    Attributes:
      ours: our shape.
      split: our shape with the joined axes taken apart.
      order: which axis of `split` comes where in the stored tensor.
      stored: the stored shape.
      reversed: which axes, counted after `order`, are stored in reverse.
    """

    ours: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    stored: tuple[int, ...]
    reversed: tuple[int, ...] = ()

    @property
    def _turns(self) -> tuple[Any, ...]:
        steps = (-1 if i in self.reversed else 1 for i in range(len(self.order)))
        return (*(slice(None, None, step) for step in steps), ...)

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        value = value.reshape(self.split).transpose(self.order)
        return value[self._turns].reshape(self.stored)

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        value = value.reshape([self.split[axis] for axis in self.order])
        value = value[self._turns]
        return value.transpose(np.argsort(self.order)).reshape(self.ours)


def stored_shapes(table: Table, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors that a format stores for a model."""
    shapes = {}
    for tensor in table:
        first, *rest = _layout(tensor, model).stored
        for name in _names(tensor, model):
            shapes[name] = (first * len(tensor.ours), *rest)
    return shapes


def check(path: Path, table: Table, model: ModelConfig, stored: Shapes) -> None:
    """Raises ValueError for the first tensor that is missing, surplus or misshapen.

    Args:
      stored: the names and shapes in the file.
    """
    expected = stored_shapes(table, model)
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{path} lacks the tensor {name}")
        if stored[name] != shape:
            raise ValueError(
                f"{path}: {name} is {stored[name]}, but the other tensors make it "
                f"{shape}"
            )
    surplus = [name for name in stored if name not in expected]
    if surplus:
        raise ValueError(
            f"{path} has {len(surplus)} tensors that navit does not know, first "
            f"{surplus[0]}"
        )


def reader(
    table: Table, model: ModelConfig, load: Callable[[str], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """`Weights.get` for a checked file; `load` reads a stored tensor as float32."""
    place = {
        ours: (tensor, part)
        for tensor in table
        for part, ours in enumerate(tensor.ours)
    }

    def get(ours: str) -> np.ndarray:
        tensor, part = place[ours]
        layout = _layout(tensor, model, part)

        def one(name: str) -> np.ndarray:
            pieces = np.split(load(name), len(tensor.ours))
            return layout.to_ours(pieces[part])

        if not tensor.by_layer:
            return one(tensor.name)
        out = np.empty(shapes_of(model)[ours], np.float32)
        for i, name in enumerate(_names(tensor, model)):
            out[i] = one(name)
        return out

    return get


def encoded(table: Table, weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor as it is stored, with one entry of the table in memory."""
    for tensor in table:
        parts = range(len(tensor.ours))
        layouts = [_layout(tensor, weights.model, part) for part in parts]
        values = [weights.read(ours) for ours in tensor.ours]
        for i, name in enumerate(_names(tensor, weights.model)):
            layer = [value[i] if tensor.by_layer else value for value in values]
            pieces = [
                x.to_stored(value) for x, value in zip(layouts, layer, strict=True)
            ]
            one = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            yield name, np.ascontiguousarray(one)


def _names(tensor: Tensor, model: ModelConfig) -> list[str]:
    if not tensor.by_layer:
        return [tensor.name]
    layers = shapes_of(model)[tensor.ours[0]][0]
    return [tensor.name.format(i) for i in range(layers)]


def _layout(tensor: Tensor, model: ModelConfig, part: int = 0) -> _Layout:
    """The layout of one of `ours`, or of one layer if each is stored by itself."""
    name, axes = tensor.ours[part], tensor.axes
    shape = shapes_of(model)[name][1 if tensor.by_layer else 0 :]
    if isinstance(axes, tuple):
        axes = axes[part]
    if axes is None:
        return _Layout(shape, shape, tuple(range(len(shape))), shape)
    stacked = ".blocks." in name and not tensor.by_layer
    ours, stored = (
        re.findall(r"\([^)]*\)|[^ ()]+", ("layers " if stacked else "") + side)
        for side in axes.split("->")
    )
    tower = model.text if name.startswith("text.") else model.vision
    assert tower is not None
    side = model.vision.patch_size
    sizes = {"h": tower.num_heads, "rows": side, "columns": side, "rgb": 3, "1": 1}
    sizes |= {"frames": model.vision.patch_frames, "xy": 2, "pair": 2}
    for group, size in zip(ours, shape, strict=True):
        for axis in set(_axes(group)) - sizes.keys():  # at most one
            known = math.prod(sizes[x] for x in _axes(group) if x in sizes)
            sizes[axis] = size // known
    split = [axis for group in ours for axis in _axes(group)]
    placed = [x for group in stored for x in _axes(group) if x != "1"]
    plain = [[x.removeprefix("~") for x in _axes(group)] for group in stored]
    return _Layout(
        shape,
        tuple(sizes[axis] for axis in split),
        tuple(split.index(x.removeprefix("~")) for x in placed),
        tuple(math.prod(sizes[axis] for axis in group) for group in plain),
        tuple(i for i, x in enumerate(placed) if x.startswith("~")),
    )


def _axes(group: str) -> list[str]:
    """`"(h k)"` -> `["h", "k"]`."""
    return group.strip("()").split()
