"""Parquet files whose rows contain the images, read one row group at a time."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navit import config
from navit.sources import records, storage
from navit.sources.bucket import is_url
from navit.sources.cache import Place, digest
from navit.sources.local_cache import LocalCache
from navit.sources.names import class_names
from navit.sources.remote import NoRanges
from navit.sources.table import import_parquet
from navit.sources.transient import is_transient

log = logging.getLogger("navit")

_KEPT_GROUPS = 4
# Reading an image reads its whole row group: warn about groups above this size.
_LARGE_GROUP = 16 << 20


class ParquetReader:
    """The rows of Parquet files, in the order of the files.

    A file that cannot be opened is left out, with a warning that names it.

    Raises:
      FileNotFoundError, ValueError: if there is no file, no file can be opened, or the
        named columns are missing.
    """

    def __init__(
        self, source: config.ParquetImages, cache: LocalCache | None = None
    ) -> None:
        self._parquet = import_parquet(source.path)
        self._path = source.path
        self._storage = storage.open_storage(source.path, cache)
        stats = storage.find(
            self._storage, source.path, (".parquet",), missing=source.missing
        )
        files = [*stats]
        self._lengths = {file: stat.size for file, stat in stats.items()}
        self._groups: list[tuple[str, int]] = []  # (file, row group)
        self._metadata: dict[str, Any] = {}  # of files behind a URL
        self.damaged: list[str] = []
        counts, largest, first = [], 0, None
        for file in files:
            try:
                with self._open(file) as opened:
                    metadata = opened.metadata
            except (ValueError, OSError) as error:
                if is_transient(error) or isinstance(error, NoRanges):
                    raise
                self.damaged.append(f"{file}: {error}")
                log.warning("left out, damaged: %s", self.damaged[-1])
                continue
            first = first or metadata
            if is_url(file):
                self._metadata[file] = metadata
            if metadata.schema.names != first.schema.names:
                raise ValueError(
                    f"{file} has the columns {', '.join(metadata.schema.names)}, and "
                    f"{files[0]} has {', '.join(first.schema.names)}: name files with "
                    "the same columns"
                )
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                counts.append(metadata.row_group(group).num_rows)
                largest = max(largest, metadata.row_group(group).total_byte_size)
        if first is None:
            raise ValueError(f"not one of {len(files)} files is readable Parquet")
        if largest > _LARGE_GROUP:
            log.warning(
                "%s: row groups have up to %d MB, and reading one image reads a whole "
                "group: write smaller ones (row_group_size=64), or tar shards",
                source.path,
                largest >> 20,
            )
        self.group_ends = np.cumsum(counts)
        schema = first.schema.to_arrow_schema()
        self._image = source.image
        chosen = records.choose(source, schema.names, source.path)
        self._caption, self._label = chosen
        named = class_names(source.classes)
        self.classes = named or _huggingface_names(schema, self._label)
        self.place = Place(
            None if is_url(files[0]) else Path(files[0]).parent,
            f"{source.path} (image {self._image}, caption {self._caption or 'none'}, "
            f"label {self._label or 'none'})",
            digest([files, [tuple(stat) for stat in stats.values()]]),
        )
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        unpicklable = ("_lock", "_cache", "_parquet")
        return {k: v for k, v in self.__dict__.items() if k not in unpicklable}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._parquet = import_parquet(self._path)
        self._start()

    def __len__(self) -> int:
        return int(self.group_ends[-1]) if len(self.group_ends) else 0

    def name(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{file}: row {row} of group {number}"

    def record(self, index: int) -> records.Raw:
        group, row = self._place(index)
        return self._raw(self._group(group), row)

    def neighbours(self, indices: Sequence[int]) -> list[records.Raw]:
        """Neighbouring rows; each of their row groups is read once, and not held."""
        found = []
        places = [self._place(index) for index in indices]
        for group, members in itertools.groupby(places, lambda place: place[0]):
            table = self._read_group(group)
            found += [self._raw(table, row) for _, row in members]
        return found

    def _raw(self, table: Any, row: int) -> records.Raw:
        def value(column: str) -> Any:
            return table.column(column)[row].as_py() if column else None

        image = value(self._image)
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise ValueError(f"the column {self._image!r} has no bytes of an image")
        label, captions = value(self._label), value(self._caption)
        return records.Raw(image, records.label_text(label), records.texts(captions))

    def _place(self, index: int) -> tuple[int, int]:
        """(row group, row in it)."""
        group = int(np.searchsorted(self.group_ends, index, "right"))
        return group, index - int(self.group_ends[group - 1] if group else 0)

    def _open(self, file: str) -> Any:
        if not is_url(file):
            return self._parquet.ParquetFile(file)
        read = functools.partial(self._storage.read_range, file, keep=True)
        opened = storage.unbuffered(read, self._lengths[file])
        metadata = self._metadata.get(file)
        return self._parquet.ParquetFile(opened, metadata=metadata, pre_buffer=True)

    def _read_group(self, group: int) -> Any:
        file, number = self._groups[group]
        columns = [c for c in (self._image, self._caption, self._label) if c]
        with self._open(file) as opened:
            return opened.read_row_group(number, columns)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._cache:
                try:
                    self._cache[group] = self._read_group(group)
                except Exception:
                    self._cache.clear()  # a later answer shows that files are readable
                    raise
                while len(self._cache) > _KEPT_GROUPS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]


def _huggingface_names(schema: Any, label: str) -> tuple[str, ...]:
    """Class names that Hugging Face's datasets library stored in the schema."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(map(str, metadata["info"]["features"][label]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()
