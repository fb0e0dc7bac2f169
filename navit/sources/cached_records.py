"""ArrayRecord files behind a URL, which are copied to the local cache to be read.

The library opens only paths of this machine (array_record 0.8.6: it refuses a file
object, and waits forever for `gs://`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from navit.sources.storage import Storage

# At most this many files are open.
_OPEN_FILES = 256

# An ArrayRecord file ends with an index of its records, at about 16 bytes each, in
# blocks of 64 KiB: these many bytes of its end are tried to count them.
_ENDS = (1 << 20, 1 << 25)
_BLOCK = 1 << 16


class Span(NamedTuple):
    """The records `skip` to `skip + take` of a file."""

    file: str
    skip: int
    take: int


class CachedRecords:
    """The records of spans of files, as `ArrayRecordDataSource` has them.

    A file is copied when the first of its records is read.

    Raises:
      ValueError: if there is no cache, a file does not fit into it, or it is damaged.
    """

    def __init__(self, storage: Storage, spans: Sequence[Span]) -> None:
        self._storage, self._spans = storage, list(spans)
        self._ends = list(itertools.accumulate(span.take for span in self._spans))
        self._start()

    def _start(self) -> None:
        self._reader = functools.lru_cache(_OPEN_FILES)(self._opened)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_reader"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        found: list[bytes] = []
        places = [self._place(index) for index in indices]
        for number, group in itertools.groupby(places, lambda place: place[0]):
            reader = self._reader(self._spans[number].file)
            found += reader.read([record for _, record in group])
        return found

    def _place(self, index: int) -> tuple[int, int]:
        """(span, record of its file)."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        skip, take = self._spans[number][1:]
        return number, skip + index - (self._ends[number] - take)

    def _opened(self, file: str) -> Any:
        try:
            return _open_copy(self._storage, file)
        except RuntimeError as error:
            raise ValueError(f"{file}: {error}") from None


def count_records(storage: Storage, file: str) -> int:
    """The records of a file; reads only its end if that is enough.

    Raises:
      RuntimeError: if it is damaged.
    """
    size = storage.stat(file).size
    for length in _ENDS:
        if length + _BLOCK >= size:
            break
        start = (size - length) // _BLOCK * _BLOCK
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "end"
            with path.open("wb") as copy:
                copy.write(storage.read_range(file, 0, _BLOCK))
                copy.seek(start)  # leaves a hole
                copy.write(storage.read_range(file, start, size - start))
            try:
                if count := open_reader(str(path)).num_records():
                    return count
            except RuntimeError:
                continue  # the index is longer
    return _open_copy(storage, file).num_records()


def _open_copy(storage: Storage, file: str) -> Any:
    """Opens the copy of a file on this machine; RuntimeError if it is damaged."""
    while True:
        path = storage.local_file(file)
        try:
            return open_reader(path)
        except RuntimeError:
            if os.path.exists(path):
                raise
            # The cache has deleted it meanwhile.


def open_reader(path: str) -> Any:
    """Reads single records of an ArrayRecord file, as `ArrayRecordDataSource` does.

    Raises:
      RuntimeError: if it is not one.
    """
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
