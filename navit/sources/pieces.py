"""Any source in pieces, to be written as tar shards: files, or ranges of records.

Tars, also compressed ones, and TFRecord are read from first to last, as they are. Of
other sources, records are read by index, many at a time.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from navit import config
from navit.sources import array_record, examples, in_order, records, storage
from navit.sources.cache import digest
from navit.sources.cached_records import Span
from navit.sources.images import open_image, standard
from navit.sources.in_order import Sample
from navit.sources.index_part import reason
from navit.sources.kinds import Opener
from navit.sources.local_cache import LocalCache
from navit.sources.names import class_names
from navit.sources.source import Source
from navit.sources.tar_fields import COMPRESSED
from navit.sources.transient import is_transient

# Records that are read at the same time: behind a URL, each may be a request.
_THREADS = 32

# Bytes that are read at a time of a file on this machine.
_BLOCK = 1 << 20

# Examples to look at for feature names, as one may lack a feature that others have.
_LOOKED_AT = 16

# Formats whose usual suffix is not Pillow's name of them.
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}

Advance = Callable[[int], object]


class Piece(NamedTuple):
    """A part of a source, which becomes one shard or several.

    Attributes:
      name: comes before the names of its samples; empty for a range of records.
      size: its bytes, or its records.
      samples: reads the samples, and tells its argument how much of `size` is read.
    """

    name: str
    size: int
    samples: Callable[[Advance], Iterator[Sample]]


class Pieces(NamedTuple):
    """A source in pieces.

    Attributes:
      version: changes with the data.
      classes: the names of labels that are numbers; empty if they have none.
      unit: what the sizes of the pieces count.
    """

    pieces: list[Piece]
    version: str
    classes: tuple[str, ...] = ()
    unit: str = "B"


def pieces_of(
    source: config.AnySource, images: int, cache: LocalCache | None = None
) -> Pieces:
    """Opens a source, and divides it into pieces.

    Args:
      images: the number of records in a range.
      cache: keeps copies of files behind a URL that can only be read on this machine.

    Raises:
      FileNotFoundError, ValueError: if it cannot be opened, or has no such features.
    """
    if isinstance(source, config.TarShards):
        stored = storage.open_storage(source.path)
        suffixes = (".tar", *COMPRESSED)
        found = storage.find(stored, source.path, suffixes, missing=source.missing)
        files = [*found.items()]
        return _of_files(stored, files, lambda number, file: in_order.tar_samples(file))
    if isinstance(source, config.TfRecords):
        stored = storage.open_storage(source.path)
        found = array_record.find(source, stored, (".tfrecord*",))
        files = [*found.items()]
        names = _chosen(source, stored, files)
        read = functools.partial(_example_samples, names, {})
        return _of_files(stored, files, read, class_names(source.classes))
    if isinstance(source, config.Tfds):
        from navit.sources.tfds import Prepared

        dataset = Prepared(source, cache)
        if dataset.stored == "tfrecord":
            stored = storage.open_storage(dataset.files[0])
            # In an example, the names of nested features have slashes.
            caption, label = dataset.caption, dataset.label
            features = [x.replace(".", "/") for x in (source.image, caption, label)]
            spans = dict(enumerate(dataset.spans))
            read = functools.partial(_example_samples, features, spans)
            names = [span.file for span in dataset.spans]
            stats = storage.stats_of(stored, names)
            files = [*zip(names, stats, strict=True)]
            return _of_files(stored, files, read, dataset.classes)
    return _of_records(Opener(cache=cache).open(source), images)


def _of_files(
    stored: storage.Storage,
    files: Sequence[tuple[str, storage.Stat]],
    read: Callable[[int, BinaryIO], Iterator[Sample]],
    classes: tuple[str, ...] = (),
) -> Pieces:
    """One piece a file; `read` gets its number and the open file."""

    def samples(number: int, advance: Advance) -> Iterator[Sample]:
        with _opened(stored, *files[number], advance) as file:
            yield from read(number, file)

    pieces = [
        Piece(file, stat.size, functools.partial(samples, number))
        for number, (file, stat) in enumerate(files)
    ]
    names = digest([(Path(file).name, stat.size) for file, stat in files])
    version = f"{len(files)} files (names and sizes {names[:16]})"
    return Pieces(pieces, version, classes)


def _opened(
    stored: storage.Storage, file: str, stat: storage.Stat, advance: Advance
) -> BinaryIO:
    def part(start: int, count: int) -> bytes:
        data = stored.read_range(file, start, count)
        advance(len(data))
        return data

    return storage.opened(part, stat.size, max(stored.block, _BLOCK))


def _chosen(
    source: config.TfRecords,
    stored: storage.Storage,
    files: Sequence[tuple[str, storage.Stat]],
) -> list[str]:
    """The features with the image, the caption and the label, by the first examples."""
    parsed: list[dict[str, list]] = []
    problem = f"{files[0][0]} has no record"
    for file, stat in files:
        try:
            with _opened(stored, file, stat, lambda _: None) as opened:
                for data in itertools.islice(in_order.tf_examples(opened), _LOOKED_AT):
                    parsed.append(examples.parse(data))
        except in_order.DAMAGE as error:
            problem = f"{file}: {reason(error)}"
        if parsed:
            break
    else:
        raise ValueError(problem)
    available = sorted({name for example in parsed for name in example})
    return [source.image, *records.choose(source, available, source.path)]


def _example_samples(
    names: Sequence[str], spans: dict[int, Span], number: int, file: BinaryIO
) -> Iterator[Sample]:
    """The samples of a TFRecord; only those of its span, if it has one."""
    found: Iterator[tuple[int, bytes]] = enumerate(in_order.tf_examples(file))
    stop, i = None, -1
    if (span := spans.get(number)) is not None:
        stop = span.skip + span.take
        found = itertools.islice(found, span.skip, stop)
    for i, data in found:
        read = functools.partial(_raw, data, *names)
        yield _sample(f"{number:05d}_{i:07d}", f"record {i}", read)
    if stop is not None and i < stop - 1:
        raise EOFError(f"it should have {stop} records or more")


def _raw(data: bytes, image: str, caption: str, label: str) -> records.Raw:
    return examples.raw(examples.parse(data), image, caption, label)


def _of_records(source: Source, images: int) -> Pieces:
    """One piece for every `images` records, read by index."""
    task = next(iter(source.tasks.values()), None)

    def raw(index: int) -> records.Raw:
        record, label = source.record(index), ""
        captions = record.captions
        if task is not None and task.labels[index] >= 0:
            label = str(task.labels[index])
            if captions == (task.name(index),):  # as if it had none
                captions = ()
        image = standard(record.image)
        if not isinstance(image, bytes):
            raise ValueError("it has no encoded image")
        return records.Raw(image, label, captions)

    def one(index: int) -> Sample:
        name = source.name(index)
        return _sample(f"{index:09d}", name, functools.partial(raw, index))

    def samples(start: int, size: int, advance: Advance) -> Iterator[Sample]:
        indices = iter(range(start, start + size))
        with ThreadPoolExecutor(_THREADS) as pool:
            while some := [*itertools.islice(indices, 2 * _THREADS)]:
                yield from pool.map(one, some)
                advance(len(some))

    pieces = []
    for start in range(0, len(source), images):
        size = min(images, len(source) - start)
        pieces.append(Piece("", size, functools.partial(samples, start, size)))
    classes = task.class_names if task is not None else ()
    if classes == tuple(map(str, range(len(classes)))):
        classes = ()
    return Pieces(pieces, source.fingerprint(), classes, " images")


def _sample(key: str, name: str, read: Callable[[], records.Raw]) -> Sample:
    """A record as the members of a sample; its name and an error if it is bad.

    Raises:
      OSError: for a transient error, which no record is to blame for.
    """
    try:
        raw = read()
        records.check_texts(raw.label, raw.captions)
        return Sample(key, _members(raw))
    except (ValueError, OSError, RecursionError) as error:
        if is_transient(error):
            raise
        return Sample(name, {}, reason(error))


def _members(raw: records.Raw) -> dict[str, bytes]:
    assert isinstance(raw.image, bytes)
    format = str(open_image(raw.image).format)
    members = {_SUFFIX.get(format, format.lower()): raw.image}
    if raw.label:
        members["cls"] = raw.label.encode()
    try:
        (caption,) = raw.captions
        members["txt"] = caption.encode()
    except ValueError:  # none, several, or half a surrogate pair, which JSON can write
        if raw.captions:
            members["json"] = json.dumps({"caption": raw.captions}).encode()
    return members
