"""The protocol of a source: random access to images, sizes known before decoding."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from navit.sources.images import ImageLike


class Task(NamedTuple):
    """A classification: a prompt-ready name per class, a class per image (-1: none)."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # [len] int32


@runtime_checkable
class Source(Protocol):
    """Random access to images, their captions and their sizes."""

    sizes: np.ndarray  # [len, 2] int32 (height, width), upright
    tasks: dict[str, Task]  # the first one labels the training batch

    def __len__(self) -> int: ...
    def image(self, index: int) -> ImageLike: ...
    def captions(self, index: int) -> tuple[str, ...]: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...  # changes when the data does
