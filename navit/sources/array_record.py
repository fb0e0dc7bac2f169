"""Reads `tf.train.Example`s, and nothing else, from ArrayRecord files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from navit import config
from navit.sources import examples, records, storage
from navit.sources.bucket import is_url
from navit.sources.cache import Place, digest, read_arrays, write_arrays
from navit.sources.cached_records import CachedRecords, Span, count_records
from navit.sources.local_cache import LocalCache
from navit.sources.names import class_names
from navit.sources.source import no_random_access

log = logging.getLogger("navit")

_SUFFIXES = (".array_record*", ".arrayrecord*")

# Examples to look at for feature names, as one may lack a feature that others have.
_LOOKED_AT = 16


class ArrayRecordReader:
    """The records of ArrayRecord files, in the order of the files.

    A file that cannot be opened is left out, with a warning that names it. Files behind
    a URL are read through a local cache.

    Raises:
      FileNotFoundError, ValueError: if there is no file, files are behind a URL and
        there is no cache, no file can be opened, or the records are not
        `tf.train.Example`s with the named features.
    """

    def __init__(
        self, source: config.ArrayRecords, cache: LocalCache | None = None
    ) -> None:
        stored = storage.open_storage(source.path, cache)
        found = find(source, stored, _SUFFIXES)
        for file in found:
            if ".tfrecord" in Path(file).name:
                what, other = (
                    f"{file} is TFRecord, which",
                    config.TfRecords(**vars(source)),
                )
                raise ValueError(no_random_access(what, other))
        remote = is_url(source.path)
        files, stats = [*found], [tuple(stat) for stat in found.values()]
        opened = _open_cached(files, stored, stats) if remote else _open(files)
        self._source: Any = opened[0]
        self.damaged = opened[1]
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
            None if remote else Path(files[0]).parent,
            f"{source.path} (image {self._image}, caption {self._caption or 'none'}, "
            f"label {self._label or 'none'})",
            digest([files, stats]),
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
        return examples.raw(example, self._image, self._caption, self._label)

    def _example(self, index: int) -> dict[str, list[Any]]:
        try:
            data = self._source[index]
        except RuntimeError as error:  # damaged
            raise ValueError(str(error)) from None
        return examples.parse(data)


def find(
    source: config.ArrayRecords, stored: storage.Storage, suffixes: tuple[str, ...]
) -> dict[str, storage.Stat]:
    """The source's files; those with one of these suffixes if it is a folder.

    A suffix may end in `*`: TFDS writes a.array_record-00000-of-00008.
    """
    path = source.path
    if is_url(path):
        marks = (*"*?[{", *(suffix.rstrip("*") for suffix in suffixes))
        folder = not any(mark in path for mark in marks)
    else:
        folder = Path(path).expanduser().is_dir()
    return storage.find(
        stored, path, suffixes if folder else ("",), missing=source.missing
    )


def _open_cached(
    files: list[str], stored: storage.Storage, stats: list[tuple]
) -> tuple[CachedRecords, list[str]]:
    """As `_open`, of files behind a URL; the numbers of their records are saved."""
    place = Place(None, f"records of {files[0]} and others", digest([files, stats]))
    saved = read_arrays(place, "records")
    if saved is None:
        with ThreadPoolExecutor(min(32, len(files))) as pool:
            found = list(pool.map(lambda file: _counted(stored, file), files))

        def fill(arrays: dict[str, np.ndarray]) -> dict:
            arrays["counts"][:] = [0 if isinstance(n, str) else n for n in found]
            return {"damaged": [n for n in found if isinstance(n, str)]}

        shapes = {"counts": (np.dtype(np.int64), (len(files),))}
        saved = write_arrays(place, "records", shapes, fill)
    counts, damaged = saved.arrays["counts"].tolist(), saved.facts["damaged"]
    if len(damaged) == len(files):
        raise ValueError(
            f"not one of {len(files)} files is an ArrayRecord file: {damaged[0]}"
        )
    pairs = zip(files, counts, strict=True)
    return CachedRecords(stored, [Span(file, 0, n) for file, n in pairs if n]), damaged


def _counted(stored: storage.Storage, file: str) -> int | str:
    """The records of a file, or what is wrong with it."""
    try:
        return count_records(stored, file)
    except RuntimeError as error:
        return f"{file}: {error}"


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
