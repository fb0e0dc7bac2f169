"""Files that can only be read in order: compressed tars, TFRecord."""

from __future__ import annotations

import functools
import gzip
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from navit import config
from navit.sources import examples, records, storage, tar_fields
from navit.sources.cache import digest
from navit.sources.images import size_of
from navit.sources.source import Record, Task

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tfrecord", ".tfrecord-*", ".tfrecords")
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


class Streamed(NamedTuple):
    """One record; one with an `error` leaves its slot empty, and is counted."""

    name: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    size: tuple[int, int] = (1, 1)
    error: str = ""


class StreamSource:
    """The records of files from first to last, without random access.

    Raises:
      FileNotFoundError: if there are no files.
    """

    def __init__(self, source: config.Stream) -> None:
        self.tasks: dict[str, Task] = {}
        self._config = source
        self._storage = storage.open_storage(source.path)
        self.files = storage.find(
            self._storage, source.path, _SUFFIXES, missing=source.missing
        )
        self._captions = tar_fields.caption_fields(source.caption)

    def fingerprint(self) -> str:
        """Changes with the files' names and their sizes in bytes."""
        files = [(PurePath(f).name, self._storage.stat(f).size) for f in self.files]
        return f"{len(files)} files in order (names and lengths {digest(files)[:16]})"

    def read(self, order: Sequence[int]) -> Iterator[Streamed]:
        """The records of the files, file by file in this order.

        A damaged file is used up to the damage, which counts as a record with an error.

        Raises:
          OSError: if a file cannot be read.
        """
        for file in (self.files[i] for i in order):
            read = _examples if ".tfrecord" in PurePath(file).name else self._samples
            part = functools.partial(self._storage.read_range, file)
            size, block = self._storage.stat(file).size, self._storage.block
            with storage.opened(part, size, max(block, 1 << 20)) as opened:
                try:
                    for key, raw in read(opened):
                        yield _record(f"{file}: {key}", raw, self._raw)
                except _DAMAGE as error:
                    yield Streamed(file, error=f"damaged from here on: {error}")

    def _raw(self, data: bytes | dict[str, bytes]) -> records.Raw:
        captions: tuple[str, ...] = ()
        if isinstance(data, bytes):
            example = examples.parse(data)
            images = example.get(self._config.image, [])
            captions = records.texts(example.get(self._config.caption or "caption"))
        else:
            images = [data["image"]] if "image" in data else []
            for name, field in self._captions:
                must = bool(self._config.caption)
                value = captions or tar_fields.field_of(
                    data.get(name), name, field, must
                )
                captions = records.texts(value)
        if len(images) != 1 or not isinstance(images[0], bytes):
            raise ValueError("it has no encoded image")
        if not captions:
            raise ValueError("it has no caption")
        return records.Raw(images[0], "", captions)

    def _samples(self, file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A tar's samples: adjacent members with the same key, as in WebDataset."""
        wanted = {name for name, _ in self._captions}
        last = ""
        sample: dict[str, bytes] = {}
        with tarfile.open(fileobj=file, mode="r|*", bufsize=1 << 20) as opened:
            while (member := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined]  # it keeps every member
                name = tar_fields.NAME.fullmatch(member.name)
                if not (name and member.isreg()) or member.issparse():
                    continue
                if name[1] != last:
                    if sample:
                        yield last, sample
                    last, sample = name[1], {}
                suffix = name[2].lower()
                column = "image" if suffix in tar_fields.IMAGES else suffix
                if column in wanted or column == "image":
                    content = opened.extractfile(member)
                    assert content is not None
                    sample.setdefault(column, content.read())
            rest = opened.fileobj.read(512)
        if sample:
            yield last, sample
        if not rest or rest.strip(b"\0"):
            raise EOFError("its end is missing")


class Carried:
    """The records of one batch as a source."""

    left_out = damaged = 0

    def __init__(self, carried: tuple[Streamed, ...]) -> None:
        self.tasks: dict[str, Task] = {}
        self._records = carried
        self.sizes = np.array([r.size for r in carried], np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record:
        streamed = self._records[index]
        if streamed.error:
            raise ValueError(streamed.error)
        return Record(streamed.image, streamed.captions)

    def name(self, index: int) -> str:
        return self._records[index].name

    def fingerprint(self) -> str:
        return f"{len(self)} records"

    def version(self) -> str:
        return self.fingerprint()


def _record(name: str, data: Any, parse: Callable[[Any], records.Raw]) -> Streamed:
    try:
        raw = parse(data)
        assert isinstance(raw.image, bytes)
        return Streamed(name, raw.image, raw.captions, size_of(raw.image))
    except (ValueError, RecursionError) as error:
        return Streamed(name, error=str(error))


def _examples(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """A TFRecord's records: a length, its checksum, the data, its checksum."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    opened = gzip.GzipFile(fileobj=file) if packed else file
    for number in itertools.count():
        head = opened.read(12)
        if not head:
            return
        size = int.from_bytes(head[:8], "little")
        data = opened.read(size + 4) if size < 1 << 31 else b""
        if len(data) < size + 4:
            raise EOFError(f"record {number} should have {size} bytes")
        yield f"record {number}", data[:size]
