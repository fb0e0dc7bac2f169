"""A source over records, in any kind of file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np

from navit.sources.cache import Place, digest
from navit.sources.index import ALL, Share, measure
from navit.sources.index_join import Index
from navit.sources.index_part import Entry
from navit.sources.source import Record, Task

_MAX_UNNAMED = 1_000_000
# The index stores all labels at the length of the longest.
_LONGEST_LABEL = 1000


class Raw(NamedTuple):
    """One record: its image, its label (empty: none), its captions."""

    image: bytes | BinaryIO
    label: str
    captions: tuple[str, ...]


@runtime_checkable
class Reader(Protocol):
    """Random access to the records of one kind of file."""

    place: Place
    classes: tuple[str, ...]  # names of integer labels; empty: not known
    damaged: list[str]  # one line per damaged file: its name and what is wrong

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def record(self, index: int) -> Raw: ...


@runtime_checkable
class Indexed(Protocol):
    """A reader that makes the sizes index itself, as it finds its records."""

    index: Index


@runtime_checkable
class PieceReader(Protocol):
    """A reader that reads neighbouring records in one piece."""

    def neighbours(self, indices: Sequence[int]) -> list[Raw]: ...


@runtime_checkable
class GroupReader(Protocol):
    """A reader that reads a record's whole group, even for one record."""

    group_ends: np.ndarray  # [g] int64, the records up to the end of each group


class RecordSource:
    """The `Source` of all usable records of a reader.

    An image without a caption is captioned with the name of its class.

    Raises:
      ValueError: if nothing is readable, or a label has no name in `reader.classes`.
    """

    def __init__(self, reader: Reader, *, share: Share = ALL) -> None:
        self._reader = reader
        if isinstance(reader, Indexed):
            self._index = reader.index
        else:
            self._index = measure(
                lambda i: entry_of(reader.record(i)),
                reader.name,
                len(reader),
                reader.place,
                share=share,
            )
        self.left_out, self.damaged = self._index.left_out, len(reader.damaged)
        self.sizes = self._index.sizes
        self.groups: np.ndarray | None = None
        if isinstance(reader, GroupReader):
            self.groups = self._index.usable(reader.group_ends)
        task = _task(self._index, reader.classes, reader.place.identity)
        self.tasks = {} if task is None else {"label": task}

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, index: int) -> Record:
        raw = self._reader.record(self._stored(index))
        captions = raw.captions or (self.tasks["label"].name(index),)
        return Record(raw.image, captions)

    def neighbours(self, indices: Sequence[int]) -> list[Record]:
        """Neighbouring records, in ascending order, read in one piece if possible.

        Raises:
          ValueError, OSError: if one of them cannot be read.
        """
        if not isinstance(self._reader, PieceReader):
            return [self.record(index) for index in indices]
        stored = self._index.records(np.asarray(indices))
        raws = self._reader.neighbours(stored.tolist())
        return [
            Record(raw.image, raw.captions or (self.tasks["label"].name(index),))
            for index, raw in zip(indices, raws, strict=True)
        ]

    def name(self, index: int) -> str:
        return self._reader.name(self._stored(index))

    def _stored(self, index: int) -> int:
        """The record of this image, counting unusable ones."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(self._index.records(np.asarray([index]))[0])

    def fingerprint(self) -> str:
        return self._index.described

    def version(self) -> str:
        return digest(self._reader.place[1:])


def texts(value: Any) -> tuple[str, ...]:
    """The captions in a field: one or several, bytes or text; drops empty ones.

    Raises:
      ValueError: if it is something else.
    """
    if value is None:
        return ()
    many = value if isinstance(value, list | tuple | np.ndarray) else [value]
    captions = []
    for item in many:
        if isinstance(item, bytes):
            item = item.decode()  # UnicodeDecodeError is a ValueError
        if not isinstance(item, str):
            raise ValueError(f"a caption must be text, not {item!r:.60}")
        if item.strip():
            captions.append(item.strip())
    return tuple(captions)


def label_text(value: Any) -> str:
    """A label as the index stores it; "" for none or for a negative number.

    Raises:
      ValueError: if it is neither an integer nor text, or too long for a class name.
    """
    if isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.ndim == 1
    ):
        if len(value) > 1:
            raise ValueError(f"expected one label, not {len(value)}")
        value = value[0] if len(value) else None
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        if len(value) > _LONGEST_LABEL:
            raise ValueError(
                f"a label of {len(value)} characters (at most {_LONGEST_LABEL}), "
                f"{value!r:.40}: is it a caption?"
            )
        return "" if re.fullmatch(r"\s*-\d+\s*", value) else value.strip()
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value)) if value >= 0 else ""
    raise ValueError(f"a label must be an integer or text, not {value!r:.60}")


def nested(record: Any, path: str, where: str) -> Any:
    """The field `a.b` of dicts in dicts; a list of dicts gives a list.

    Raises:
      ValueError: if it is missing; names what is there instead.
    """
    for key in path.split("."):
        if isinstance(record, list | tuple) and record:
            record = [nested(item, key, where) for item in record]
            continue
        if not isinstance(record, Mapping) or key not in record:
            raise ValueError(missing(key, record, where))
        record = record[key]
    return record


def missing(name: str, available: Any, where: str) -> str:
    """An error text that names what there is instead."""
    names = (
        ", ".join(map(str, available))
        if isinstance(available, Iterable)
        else repr(available)
    )
    return f"{where} has no {name!r} (it has: {names})"


def choose(
    config: Any, available: Iterable[str], where: str, *, deep: bool = False
) -> tuple[str, str]:
    """(caption, label): the fields to read; "" for none.

    One that is None in the config is the field of that name, if there is one.

    Args:
      deep: a field may be `a.b`, which needs only `a` to be available.

    Raises:
      ValueError: if the image or a field that the config names is not available, or if
        neither a caption nor a label is left.
    """
    available = list(available)

    def there(name: str) -> bool:
        return (name.partition(".")[0] if deep else name) in available

    if not there(config.image):
        raise ValueError(missing(config.image, available, where))
    chosen = []
    for field in ("caption", "label"):
        name = getattr(config, field)
        if name is None:
            name = field if field in available else ""
        elif name and not there(name):
            raise ValueError(missing(name, available, where))
        chosen.append(name)
    caption, label = chosen
    if not caption and not label:
        raise ValueError(
            f"{where} has neither a caption nor a label as named (it has: "
            f"{', '.join(available)}): set caption= or label="
        )
    return caption, label


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in order; by value if all are integers."""
    names = sorted(labels)
    if all(label.isdecimal() for label in names):
        names.sort(key=int)
    return tuple(names)


def entry_of(raw: Raw) -> Entry:
    """What the index keeps of a record.

    Raises:
      ValueError: if it has no image, or neither a caption nor a label.
    """
    check_texts(raw.label, raw.captions)
    return Entry.of(raw.image, raw.label, raw.captions)


def check_texts(label: str, captions: tuple[str, ...]) -> None:
    """Raises ValueError if a record has neither."""
    if not captions and not label:
        raise ValueError("it has no caption and no label")


def _task(index: Index, names: tuple[str, ...], where: str) -> Task | None:
    """The task of the labels: integers index the names, and words are looked up.

    Without names, the words themselves are the names, sorted.
    """
    if index.top < 0:
        return None
    labels, words, top = index.labels, index.words, index.top
    if len(words):
        try:
            numbers = words.astype(np.int64)
        except (ValueError, OverflowError):
            texts = np.char.decode(words, "utf-8").tolist()
            names = names or tuple(texts)
            number = {name: i for i, name in enumerate(names)}
            for text in texts:
                if text not in number:
                    raise ValueError(
                        f"{where}: the label {text!r} is not among the {len(names)} "
                        "names of classes="
                    ) from None
            numbers = np.array([number[text] for text in texts])
        top = int(numbers.max())
        if not np.array_equal(numbers, np.arange(len(numbers))):
            labels = np.append(numbers, -1).astype(np.int32)[labels]
    if not names and top < _MAX_UNNAMED:
        names = tuple(map(str, range(top + 1)))
    if top >= len(names):
        raise ValueError(
            f"{where}: the label {top} has no name among {len(names)}: set classes= to "
            "a text file with one name per line"
        )
    return Task(names, labels)
