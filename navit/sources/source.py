"""The protocol of a source: random access to images, sizes known before decoding."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from navit.config.sources import Single, words
from navit.sources.images import ImageLike


class Task(NamedTuple):
    """A classification: a prompt-ready name per class, a class per image (-1: none)."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # [len] int32

    def name(self, index: int) -> str:
        """The class name of an image that has a label."""
        return self.class_names[self.labels[index]]


class Record(NamedTuple):
    """An image with its captions.

    The image may be a path or an open file: it is read only if it is used.
    """

    image: ImageLike
    captions: tuple[str, ...] = ()


@runtime_checkable
class InPieces(Protocol):
    """A source that can read neighbouring records in one piece."""

    def neighbours(self, indices: Sequence[int]) -> list[Record]: ...


@runtime_checkable
class InGroups(Protocol):
    """A source that may read the whole group of a record, even for one record.

    `groups` `[g]` int64 has the records up to the end of each; None if it does not.
    """

    groups: np.ndarray | None


@runtime_checkable
class Source(Protocol):
    """Random access to images with their captions; their sizes are known in advance.

    `record` raises ValueError or OSError for a record that cannot be read.
    """

    sizes: np.ndarray  # [len, 2] int32 (height, width), upright
    tasks: dict[str, Task]  # the first one labels the training batch
    left_out: int  # unreadable images, which are not counted in len
    damaged: int  # files that are damaged

    def __len__(self) -> int: ...
    def record(self, index: int) -> Record: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...  # changes with sizes, captions and labels
    def version(self) -> str: ...  # changes with any file


def no_random_access(what: str, source: Single) -> str:
    """An error text with the command that makes tar shards of a source."""
    named, *fields = words(source)
    return (
        f"{what} has no random access: write tar shards once, with `navit reshard "
        f"{shlex.join([named, 'OUT', *fields])}`, and set data.train=tars:OUT"
    )
