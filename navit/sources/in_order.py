"""Reads files from first to last: tars, also compressed ones, and TFRecord.

Damage raises one of `DAMAGE`, after all samples before it have been returned.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

from navit.sources.tar_fields import NAME

DAMAGE = (
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    ValueError,
    RecursionError,
)

# Longer records and headers are refused before they are read, since a few kilobytes of
# gzip can stand for gigabytes.
_LONGEST, _LONGEST_HEADER = 1 << 30, 1 << 20


class Sample(NamedTuple):
    """The contents of one record's members by suffix; one with an `error` is bad."""

    key: str
    members: dict[str, bytes]
    error: str = ""


def tar_samples(file: BinaryIO) -> Iterator[Sample]:
    """A tar's samples: adjacent members with the same key, as in WebDataset."""
    sample: Sample | None = None
    try:
        for key, suffix, size, read in _tar_members(file):
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key, {})
            size += sum(map(len, sample.members.values()))
            if size > _LONGEST:
                error = f"it has {size} bytes, more than the limit of {_LONGEST}"
                sample = sample._replace(error=error)
            elif suffix not in sample.members:  # the first of several
                sample.members[suffix] = read()
    except DAMAGE:
        if sample is not None and sample.members:
            yield sample
        raise
    if sample is not None:
        yield sample


def tf_examples(file: BinaryIO) -> Iterator[bytes]:
    """A TFRecord's records: a length, its checksum, the data, its checksum."""
    opened = _unpacked(file)
    for number in itertools.count():
        head = opened.read(12)
        if not head:
            return
        if len(head) < 12:
            raise EOFError(f"record {number} has {len(head)} bytes of its first 12")
        size = int.from_bytes(head[:8], "little")
        if size > _LONGEST:
            limit = f"more than the limit of {_LONGEST}"
            raise EOFError(f"record {number} has {size} bytes, {limit}")
        data = opened.read(size + 4)
        if len(data) < size + 4:
            raise EOFError(f"record {number} should have {size} bytes")
        yield data[:size]


def _tar_members(
    file: BinaryIO,
) -> Iterator[tuple[str, str, int, Callable[[], bytes]]]:
    """The key, suffix and size of each member of a sample, and what reads it."""
    unpacked: Any = _unpacked(file)
    if isinstance(unpacked, gzip.GzipFile):  # its read() loses what precedes damage
        unpacked = SimpleNamespace(read=unpacked.read1)
    with tarfile.open(
        fileobj=unpacked, mode="r|*", bufsize=1 << 20, tarinfo=_Header
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps every member
            name = NAME.fullmatch(member.name)
            if name and member.isreg() and not member.issparse():
                content = tar.extractfile(member)
                assert content is not None
                yield name[1], name[2].lower(), member.size, content.read
        # The first block of zeros has been read; gzip's checksum is at the end.
        rest = tar.fileobj.read(1 << 20)
        if not rest:
            raise EOFError("its end is missing")
        while rest:
            if rest.strip(b"\0"):
                raise EOFError("it has something else after its end")
            rest = tar.fileobj.read(1 << 20)


def _unpacked(file: BinaryIO) -> Any:
    """The file without gzip; a GzipFile is no BinaryIO to run-time type checks."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file


class _Header(tarfile.TarInfo):
    """A member's header; refuses those that would make tarfile read without a bound."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        is_long = not header.isreg() and header.size > _LONGEST_HEADER
        if is_long or header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"a header of {header.size} bytes is refused")
        return header
