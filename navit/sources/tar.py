"""Reads WebDataset's tar shards by offset, without unpacking them."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from navit import config
from navit.sources import index as sizes_index
from navit.sources import records, storage
from navit.sources.cache import Place, digest, read_arrays, write_arrays
from navit.sources.names import class_names

log = logging.getLogger("navit")

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm")
_CAPTIONS = ("txt", "json.caption")
# webdataset's rule: the key ends at the first dot of the file name.
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


_Read = Callable[[int, int], bytes]  # (start, size) -> bytes of a shard


class _Scan(NamedTuple):
    """One shard's samples, and what is wrong with it."""

    keys: np.ndarray  # [m] bytes
    members: np.ndarray  # [m, columns, 2] int64 (offset, size); offset -1: none
    damage: str


class TarReader:
    """Samples of tar shards: `KEY.jpg` with `KEY.txt`, `.json` or `.cls`.

    The whole samples of a truncated shard are used; the shard is named and counted.

    Raises:
      FileNotFoundError, ValueError: if there is no shard, or no shard has an image.
    """

    def __init__(self, shards: config.TarShards, *, again: bool = False) -> None:
        self._storage = storage.open_storage(shards.path)
        self._shards = storage.find(
            self._storage, shards.path, (".tar",), missing=shards.missing
        )
        self.classes = class_names(shards.classes)
        stats = [self._storage.stat(shard) for shard in self._shards]
        remote = storage.is_remote(self._shards[0])
        self.place = Place(
            None if remote else Path(self._shards[0]).parent,
            f"{shards.path} (caption {shards.caption or 'txt or json.caption'}, "
            f"label {shards.label or 'none'})",
            digest([self._shards, [tuple(stat) for stat in stats]]),
        )
        # (member, field of a .json): the first one present is used.
        self._caption = caption_fields(shards.caption)
        self._label = _spec(shards.label)
        self._must = bool(shards.caption)
        wanted = [name for name, _ in (*self._caption, self._label) if name]
        self._columns = ["image", *dict.fromkeys(wanted)]

        arrays = None if again else read_arrays(self.place, "tar")
        if arrays is None:
            arrays = self._index([stat.size for stat in stats])
            if again or len(arrays["keys"]) >= sizes_index.MIN_KEPT:
                write_arrays(self.place, "tar", **arrays)
        self._keys, self._shard = arrays["keys"], arrays["shard"]
        self._members = arrays["members"]
        self.damaged = arrays["damage"].tolist()
        for line in self.damaged[:10]:
            log.warning("damaged, used up to the damage: %s", line)
        if len(self.damaged) > 10:
            log.warning("damaged: %d more shards", len(self.damaged) - 10)
        if not len(self._keys):
            reason = f" ({self.damaged[0]})" if self.damaged else ""
            raise ValueError(
                f"{shards.path}: {len(self._shards)} shards have no image{reason}"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        key = self._keys[index].decode(errors="replace")
        return f"{self._shards[self._shard[index]]}: {key}"

    def record(self, index: int) -> records.Raw:
        read = functools.partial(self._storage.read_range, self._path(index))
        return self._raw(index, self.open_image(index), read)

    def neighbours(self, indices: Sequence[int]) -> list[records.Raw]:
        """Neighbouring samples, one piece of each shard."""
        found = []
        for _, group in itertools.groupby(indices, lambda i: self._shard[i]):
            some = list(group)
            starts, sizes = np.moveaxis(self._members[some], -1, 0)
            first = int(starts[starts >= 0].min())
            last = int((starts + sizes).max())
            piece = self._storage.read_range(self._path(some[0]), first, last - first)
            read = functools.partial(_cut, memoryview(piece), first)
            for i in some:
                image = self._read(i, "image", read)
                assert image is not None
                found.append(self._raw(i, image, read))
        return found

    def _raw(self, index: int, image: bytes | BinaryIO, read: _Read) -> records.Raw:
        captions: tuple[str, ...] = ()
        for name, field in self._caption:
            if not captions:
                data = self._read(index, name, read)
                captions = records.texts(field_of(data, name, field, self._must))
        name, field = self._label
        label = field_of(self._read(index, name, read), name, field, True)
        return records.Raw(image, records.label_text(label), captions)

    def _read(self, index: int, column: str, read: _Read) -> bytes | None:
        if not column:
            return None
        start, size = self._members[index, self._columns.index(column)].tolist()
        if start < 0:
            return None
        data = read(start, size)
        if len(data) != size:
            raise ValueError(
                f"{self.name(index)} ends after {len(data)} of {size} bytes"
            )
        return data

    def open_image(self, index: int) -> BinaryIO:
        """The image as a file that reads no more than it is asked for."""
        start, size = self._members[index, 0].tolist()
        path, read = self._path(index), self._storage.read_range
        block = min(self._storage.block, 1 << 16)
        return storage.opened(lambda at, n: read(path, start + at, n), size, block)

    def _path(self, index: int) -> str:
        return self._shards[self._shard[index]]

    def _index(self, lengths: list[int]) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            pending = pool.map(self._scan, self._shards, lengths)
            count = len(lengths)
            scans = list(tqdm(pending, "offsets", count, unit=" shards", delay=2))
        damage = [
            f"{shard}: {scan.damage}"
            for shard, scan in zip(self._shards, scans, strict=True)
            if scan.damage
        ]
        counts = [len(scan.keys) for scan in scans]
        return {
            "keys": np.concatenate([scan.keys for scan in scans]),
            "shard": np.repeat(np.arange(len(scans), dtype=np.int32), counts),
            "members": np.concatenate([scan.members for scan in scans]),
            "damage": np.array(damage, "U"),
        }

    def _scan(self, shard: str, length: int) -> _Scan:
        samples: dict[str, list[tuple[int, int]]] = {}
        read = functools.partial(self._storage.read_range, shard)
        block = 2048 if self._storage.block <= 1 << 16 else self._storage.block
        damage = ""
        with storage.opened(read, length, block) as file:
            try:
                end = self._walk(file, length, samples)
                file.seek(end)
                if file.read(512).strip(b"\0"):
                    damage = f"it has something else after byte {end}"
                elif end >= length:
                    damage = f"cut off at byte {length}"
            except EOFError as error:
                damage = f"cut off at byte {length}, {error}"
            except (tarfile.TarError, ValueError) as error:
                file.seek(0)
                packed = file.read(2) == b"\x1f\x8b"
                damage = "compressed, so it has no offsets" if packed else str(error)
        # The image is the first column.
        whole = {key: places for key, places in samples.items() if places[0][0] >= 0}
        if len(whole) < len(samples) and not damage:
            damage = f"{len(samples) - len(whole)} of its samples have no image"
        if damage.startswith("cut off"):
            damage += f"; its {len(whole)} whole samples are used"
        keys = [key.encode(errors="surrogateescape") for key in whole]
        members = np.array(list(whole.values()), np.int64)
        shape = (-1, len(self._columns), 2)
        return _Scan(np.array(keys, "S"), members.reshape(shape), damage)

    def _walk(self, file: BinaryIO, length: int, samples: dict) -> int:
        """Adds the shard's whole members to `samples`; returns where they end."""
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all
                if member.size < 0:  # tarfile would return to it forever
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                stop = member.offset_data + member.size
                if stop > length:
                    raise EOFError(f"where {member.name!r} is not yet whole")
                name = NAME.fullmatch(member.name)
                if not (name and member.isreg()) or member.issparse():
                    continue
                key, suffix = name[1], name[2].lower()
                column = "image" if suffix in IMAGES else suffix
                if column in self._columns:
                    absent = [(-1, -1)] * len(self._columns)
                    sample = samples.setdefault(key, absent)
                    place = self._columns.index(column)
                    if sample[place][0] < 0:  # the first of several
                        sample[place] = member.offset_data, member.size
            return tar.offset


def _cut(piece: memoryview, first: int, start: int, size: int) -> bytes:
    """Bytes of a shard, of which a piece that begins at `first` has been read."""
    return bytes(piece[start - first : start - first + size])


def caption_fields(caption: str | None) -> list[tuple[str, str]]:
    """(member, field of a .json) of each place where a caption may be."""
    return [_spec(name) for name in ([caption] if caption else _CAPTIONS)]


def field_of(data: bytes | None, name: str, field: str, must: bool) -> Any:
    """A whole member, or a field of a .json; None if there is none.

    Raises:
      ValueError: if the .json lacks the field and must have it.
    """
    if data is None or not field:
        return data
    content = json.loads(data)
    if not must and isinstance(content, dict) and field not in content:
        return None
    return records.nested(content, field, f"its .{name}")


def _spec(name: str) -> tuple[str, str]:
    """`json.a.b` -> ("json", "a.b"); `txt` -> ("txt", "")."""
    name = name.lstrip(".")
    member, _, field = name.partition(".")
    if member != "json":
        return name, ""
    if not field:
        raise ValueError(f"{name!r}: name which field of the .json, as json.caption")
    return member, field
