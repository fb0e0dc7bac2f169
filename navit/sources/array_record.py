"""Reads `tf.train.Example`s, and nothing else, from ArrayRecord files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit import config
from navit.sources import examples, records, storage
from navit.sources.cache import Place, digest
from navit.sources.names import class_names

log = logging.getLogger("navit")

# Examples to look at for feature names, as one may lack a feature that others have.
_LOOKED_AT = 16


class ArrayRecordReader:
    """The records of ArrayRecord files, in the order of the files.

    A file that cannot be opened is left out, with a warning that names it.

    Raises:
      FileNotFoundError, ValueError: if there is no file, no file can be opened, or the
        records are not `tf.train.Example`s with the named features.
    """

    def __init__(self, source: config.ArrayRecords) -> None:
        files = _files(source)
        self._source, self.damaged = _open(files)
        for line in self.damaged:
            log.warning("left out, damaged: %s", line)
        self.classes = class_names(source.classes)
        self._image, self._path = source.image, source.path
        try:
            looked_at = [self._example(i) for i in range(min(len(self), _LOOKED_AT))]
        except ValueError as error:
            raise ValueError(
                f"{source.path}: {error}. Records must be tf.train.Examples with the "
                "encoded image in a feature; other encodings are not supported"
            ) from None
        available = sorted({name for example in looked_at for name in example})
        self._caption, self._label = records.choose(source, available, source.path)
        self.place = Place(
            Path(files[0]).parent,
            f"{source.path} (image {self._image}, caption {self._caption or 'none'}, "
            f"label {self._label or 'none'})",
            digest([files, [tuple(storage.Local().stat(file)) for file in files]]),
        )

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"{self._path}: record {index}"

    def record(self, index: int) -> records.Raw:
        return self._raw(self._example(index))

    def neighbours(self, indices: Sequence[int]) -> list[records.Raw]:
        try:
            stored = self._source.__getitems__(list(indices))
            return [self._raw(examples.parse(data)) for data in stored]
        except RuntimeError as error:  # damaged
            raise ValueError(str(error)) from None

    def _raw(self, example: dict[str, list[Any]]) -> records.Raw:
        return records.Raw(
            _image(example, self._image),
            records.label_text(example.get(self._label)),
            records.texts(example.get(self._caption)),
        )

    def _example(self, index: int) -> dict[str, list[Any]]:
        try:
            data = self._source[index]
        except RuntimeError as error:  # damaged
            raise ValueError(str(error)) from None
        return examples.parse(data)


def _files(source: config.ArrayRecords) -> list[str]:
    path = source.path
    if storage.is_remote(path):
        raise ValueError(
            f"ArrayRecord files must be on this machine, not {path!r}: copy them, or "
            "mount the bucket (gcsfuse, mount-s3) and name its folder"
        )
    # TFDS writes a.array_record-00000-of-00008; a pattern may match any name.
    folder = Path(path).expanduser().is_dir()
    suffixes = (".array_record*", ".arrayrecord*") if folder else ("",)
    return storage.find(storage.Local(), path, suffixes, missing=source.missing)


def _open(files: list[str]) -> tuple[Any, list[str]]:
    """A reader of all the files that can be opened, and an error for each other one."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource(files), []
    except RuntimeError:
        pass
    whole, damaged = [], []
    for file in files:
        try:
            ArrayRecordDataSource([file])
            whole.append(file)
        except RuntimeError as error:
            damaged.append(f"{file}: {error}")
    if not whole:
        raise ValueError(
            f"not one of {len(files)} files is an ArrayRecord file: {damaged[0]}"
        )
    return ArrayRecordDataSource(whole), damaged


def _image(example: dict[str, list[Any]], name: str) -> bytes:
    values = example.get(name, [])
    if len(values) != 1 or not isinstance(values[0], bytes):
        raise ValueError(f"the feature {name!r} has no encoded image")
    return values[0]
