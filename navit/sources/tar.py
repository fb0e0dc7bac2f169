"""Reads WebDataset's tar shards by offset, without unpacking them."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from navit import config
from navit.sources import index as sizes_index
from navit.sources import records, storage, tar_scan
from navit.sources.bucket import is_url
from navit.sources.cache import Place, digest
from navit.sources.index import ALL, Share
from navit.sources.index_join import Index
from navit.sources.index_part import Entry, Part
from navit.sources.local_cache import LocalCache
from navit.sources.names import class_names
from navit.sources.source import no_random_access
from navit.sources.tar_fields import COMPRESSED, Fields, field_of

log = logging.getLogger("navit")

# Shards that are indexed at the same time: behind a URL, most of them wait.
_AT_ONCE, _AT_ONCE_REMOTE = 4, 32

_Read = Callable[[int, int], bytes]  # (start, size) -> bytes of a shard


class TarReader:
    """Samples of tar shards: `KEY.jpg` with `KEY.txt`, `.json` or `.cls`.

    The whole samples of a truncated shard are used; the shard is named and counted.

    Attributes:
      index: of all samples, made with their offsets in one pass over the shards.

    Args:
      texts: whether samples have captions and labels; otherwise, any image will do,
        even one that cannot be read.

    Raises:
      FileNotFoundError, ValueError: if there is no shard, one is compressed, or none
        has an image.
      Unfinished: if other processes have not indexed their shards.
    """

    def __init__(
        self,
        shards: config.TarShards,
        *,
        texts: bool = True,
        share: Share = ALL,
        cache: LocalCache | None = None,
    ) -> None:
        self._storage = storage.open_storage(shards.path, cache)
        found = storage.find(
            self._storage,
            shards.path,
            (".tar", *COMPRESSED),
            missing=shards.missing,
        )
        for shard in found:
            if shard.endswith(COMPRESSED):
                what = f"{shard} is compressed, so it"
                raise ValueError(no_random_access(what, shards))
        self._shards, stats = [*found], [*found.values()]
        self.classes = class_names(shards.classes)
        remote = is_url(self._shards[0])
        folder = os.path.dirname(self._shards[0])
        self.place = Place(
            folder if remote else Path(folder),
            f"{shards.path} (caption {shards.caption or 'txt or json.caption'}, "
            f"label {shards.label or 'none'})"
            if texts
            else f"{shards.path} (images only)",
            digest([self._shards, [tuple(stat) for stat in stats]]),
        )
        self._fields = Fields(shards.caption, shards.label, texts=texts)
        lengths = [stat.size for stat in stats]
        self.index = sizes_index.build(
            sizes_index.Pass(
                lambda number, stopped: self._part(number, lengths[number], stopped),
                [1] * len(lengths),
                "shards",
                ahead=_AT_ONCE_REMOTE if remote else _AT_ONCE,
            ),
            self._name if texts else None,
            self.place,
            share=share,
        )
        self._members = self.index.columns["members"]
        self._ends = self.index.columns["ends"]
        lines = self.index.columns["damage"].tolist()
        self.damaged = [line.decode(errors="surrogateescape") for line in lines]
        for line in self.damaged[:10]:
            log.warning("damaged, used up to the damage: %s", line)
        if len(self.damaged) > 10:
            log.warning("damaged: %d more shards", len(self.damaged) - 10)
        if not self.index.count:
            reason = f" ({self.damaged[0]})" if self.damaged else ""
            raise ValueError(
                f"{shards.path}: {len(self._shards)} shards have no image{reason}"
            )

    def __len__(self) -> int:
        return self.index.count

    def name(self, index: int) -> str:
        return self._name(self.index, index)

    def _name(self, index: Index, sample: int) -> str:
        shard = int(np.searchsorted(index.columns["ends"], sample, "right"))
        key = index.columns["keys"][sample].decode(errors="replace")
        return f"{self._shards[shard]}: {key}"

    def record(self, index: int) -> records.Raw:
        members = self._members[index]
        return self._raw(self._shard(index), members, self.open_image(index))

    def neighbours(self, indices: Sequence[int]) -> list[records.Raw]:
        """Neighbouring samples, one piece of each shard."""
        found = []
        for shard, group in itertools.groupby(indices, self._shard):
            rows = self._members[[*group]].astype(np.int64)
            starts, sizes = rows[..., 0] * tar_scan.BLOCK, rows[..., 1]
            first = int(starts[starts > 0].min())
            last = int((starts + sizes).max())
            piece = self._storage.read_range(shard, first, last - first, keep=True)
            read = functools.partial(_cut, memoryview(piece), first)
            for members in rows:
                image = self._content(shard, members, "image", read)
                assert image is not None
                found.append(self._raw(shard, members, image, read))
        return found

    def open_image(self, index: int) -> BinaryIO:
        """The image as a file that reads no more than it is asked for."""
        return self._opened(self._shard(index), self._members[index])

    def _opened(self, shard: str, members: np.ndarray) -> BinaryIO:
        start, size = _place(members[0])
        block = min(self._storage.block, 1 << 16)
        return storage.open_image(self._storage, shard, start, size, block)

    def _shard(self, index: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, index, "right"))]

    def _raw(
        self,
        shard: str,
        members: np.ndarray,
        image: bytes | BinaryIO,
        read: _Read | None = None,
    ) -> records.Raw:
        """A record whose members `[columns, 2]` are read with `read`."""
        ask = read or functools.partial(self._storage.read_range, shard, keep=True)

        def value(number: int) -> Any:
            wanted = self._fields.wanted[number]
            return field_of(self._content(shard, members, wanted.member, ask), *wanted)

        label, captions = self._fields.texts(value)
        return records.Raw(image, label, captions)

    def _content(
        self, shard: str, members: np.ndarray, column: str, read: _Read
    ) -> bytes | None:
        if not column:
            return None
        start, size = _place(members[self._fields.columns.index(column)])
        if not start:
            return None
        data = read(start, size)
        if len(data) != size:
            raise ValueError(
                f"{shard} ends {size - len(data)} bytes before the end of a .{column} "
                f"that begins at byte {start}"
            )
        return data

    def _part(self, number: int, length: int, stopped: threading.Event) -> Part:
        """A shard's samples, with what its pass has found of each."""
        shard = self._shards[number]
        keys, members, entries, damage = tar_scan.scan(
            functools.partial(self._storage.read_range, shard),
            length,
            self._fields,
            speed=tar_scan.REMOTE if is_url(shard) else tar_scan.LOCAL,
            stopped=stopped,
        )

        def inspect(sample: int) -> Entry:
            found = entries[sample]
            if isinstance(found, str):
                raise ValueError(found)
            if found is None:  # the connection may be back
                image = self._opened(shard, members[sample])
                return Entry.of(*self._raw(shard, members[sample], image))
            return found

        lines = [f"{shard}: {damage}".encode(errors="surrogateescape")] * bool(damage)
        columns = {"keys": keys, "members": members, "damage": np.array(lines, "S")}
        return Part(len(keys), inspect, len(keys) - 1, columns)


def _cut(piece: memoryview, first: int, start: int, size: int) -> bytes:
    """Bytes of a shard, of which a piece that begins at `first` has been read."""
    return bytes(piece[start - first : start - first + size])


def _place(member: np.ndarray) -> tuple[int, int]:
    """(first byte, size) of a member."""
    block, size = member.tolist()
    return block * tar_scan.BLOCK, size
