"""One pass over a tar shard: where its samples lie, and how large their images are."""

from __future__ import annotations

import functools
import tarfile
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from navit.sources import storage
from navit.sources.images import size_of
from navit.sources.index_part import Entry, reason
from navit.sources.tar_fields import IMAGES, NAME, Fields, field_of
from navit.sources.transient import is_exhausted, is_transient

# A tar member begins at a multiple of this many bytes.
BLOCK = 512


class Stopped(Exception):
    """The pass has ended."""


class Speed(NamedTuple):
    """How to read a shard, by what a request costs.

    A request takes some time (its latency) before the first byte. In that time, the
    bytes of `skip` would have arrived (latency x bandwidth). So what is not needed is
    skipped if it is longer than that, and otherwise read.

    Attributes:
      skip: bytes that take as long to read as a request.
      first: bytes to read where something was skipped: the end of one image, captions,
        and the header of the next image.
      most: bytes to read at a time where nothing is skipped; reached by doubling.
    """

    skip: int
    first: int
    most: int


# Behind a URL, with many shards at a time: 30 ms x 20 MB/s of each connection.
REMOTE = Speed(skip=600_000, first=1 << 16, most=1 << 22)
# On this machine: 0.1 ms x 1 GB/s.
LOCAL = Speed(skip=100_000, first=1 << 14, most=1 << 20)


class Scan(NamedTuple):
    """One shard's samples, and what is wrong with it.

    Attributes:
      keys: `[m]` bytes.
      members: `[m, columns, 2]` uint32 (block at which it begins, size in bytes); all
        zero if there is none.
      entries: of each sample; the reason if it cannot be used, None if it should be
        tried again.
    """

    keys: np.ndarray
    members: np.ndarray
    entries: list[Entry | str | None]
    damage: str


class Skipping:
    """Reads a shard from its start on, and skips what is long and not asked for."""

    def __init__(
        self, read: Callable[[int, int], bytes], length: int, speed: Speed
    ) -> None:
        self._read, self._length, self._speed = read, length, speed
        self._start, self._held, self._size = 0, b"", speed.first // 2

    def __call__(self, start: int, size: int) -> bytes:
        stop, held = start + size, self._start + len(self._held)
        if not (self._start <= start and stop <= held):
            # Of what is held, the end may be of use.
            rest = self._held[start - self._start :] if start >= self._start else b""
            begin = start + len(rest)
            far = not 0 <= begin - held <= self._speed.skip
            doubled = min(2 * self._size, self._speed.most)
            self._size = self._speed.first if far else doubled
            count = min(max(stop - begin, self._size), self._length - begin)
            self._held = rest + self._read(begin, count) if count > 0 else rest
            self._start = start
        return self._held[start - self._start : stop - self._start]


def scan(
    read: Callable[[int, int], bytes],
    length: int,
    fields: Fields,
    *,
    speed: Speed,
    stopped: threading.Event,
) -> Scan:
    """Reads a shard of `length` bytes.

    Raises:
      OSError: if it cannot be read.
      Stopped: if `stopped` is set.
    """

    def unless_stopped(start: int, size: int) -> bytes:
        if stopped.is_set():
            raise Stopped
        return read(start, size)

    shard = _Shard(Skipping(unless_stopped, length, speed), length, fields)
    damage = ""
    with storage.opened(shard.read, length, BLOCK) as file:
        try:
            end = shard.walk(file)
            file.seek(end)
            if file.read(BLOCK).strip(b"\0"):
                damage = f"it has something else after byte {end}"
            elif end >= length:
                damage = f"cut off at byte {length}"
        except EOFError as error:
            damage = f"cut off at byte {length}, {error}"
        except (tarfile.TarError, ValueError) as error:
            file.seek(0)
            packed = file.read(2) == b"\x1f\x8b"
            damage = (
                "compressed: `navit reshard` writes plain tar shards"
                if packed
                else str(error)
            )
    # The image is the first column.
    whole = {key: at for key, at in shard.samples.items() if at[0][0]}
    if (lost := len(shard.samples) - len(whole)) and not damage:
        damage = f"{lost} of its samples have no image"
    if damage.startswith("cut off"):
        damage += f"; its {len(whole)} whole samples are used"
    keys = [key.encode(errors="surrogateescape") for key in whole]
    members = np.array(list(whole.values()), np.uint32)
    return Scan(
        np.array(keys, "S"),
        members.reshape(-1, len(fields.columns), 2),
        [shard.entry(key) for key in whole],
        damage,
    )


class _Shard:
    """What a pass has found.

    Attributes:
      samples: key -> (block, size) of each column's member; zeros for none.
    """

    def __init__(self, read: Skipping, length: int, fields: Fields) -> None:
        self.read, self._length, self._fields = read, length, fields
        self.samples: dict[str, list[tuple[int, int]]] = {}
        # The size of each image, the content of what is wanted, or an error.
        self._sizes: dict[str, Any] = {}
        self._values: dict[tuple[str, int], Any] = {}

    def walk(self, file: BinaryIO) -> int:
        """Finds and reads the whole members; returns where they end."""
        columns = self._fields.columns
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all
                if member.size < 0:  # tarfile would return to it forever
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                stop = member.offset_data + member.size
                if stop > self._length:
                    raise EOFError(f"where {member.name!r} is not yet whole")
                name = NAME.fullmatch(member.name)
                if not (name and member.isreg()) or member.issparse():
                    continue
                key, suffix = name[1], name[2].lower()
                column = "image" if suffix in IMAGES else suffix
                if column not in columns or member.size >= 1 << 32:
                    continue
                sample = self.samples.setdefault(key, [(0, 0)] * len(columns))
                place = columns.index(column)
                if not sample[place][0]:  # the first of several
                    sample[place] = member.offset_data // BLOCK, member.size
                    self._look(key, column, member.offset_data, member.size)
            return tar.offset

    def _look(self, key: str, column: str, start: int, size: int) -> None:
        """Reads what the index needs of a member."""
        if column == "image":
            with storage.opened(
                lambda at, n: self.read(start + at, n), size, 2 * BLOCK
            ) as image:
                self._sizes[key] = _tried(lambda: size_of(image))
            return
        data = _tried(lambda: self.read(start, size))
        for number, wanted in enumerate(self._fields.wanted):
            if wanted.member == column:
                value = data
                if not isinstance(data, Exception):
                    value = _tried(functools.partial(field_of, data, *wanted))
                self._values[key, number] = value

    def entry(self, key: str) -> Entry | str | None:
        def made() -> Entry:
            label, captions = self._fields.texts(
                lambda number: _raised(self._values.pop((key, number), None))
            )
            height, width = _raised(self._sizes[key])
            return Entry.sized(height, width, label, captions)

        found = _tried(made)
        if isinstance(found, Exception):
            if is_exhausted(found):
                raise found
            return None if is_transient(found) else reason(found)
        return found


def _raised(found: Any) -> Any:
    if isinstance(found, Exception):
        raise found
    return found


def _tried(ask: Callable[[], Any]) -> Any:
    """The answer, or the error."""
    try:
        return ask()
    except (ValueError, OSError, RecursionError) as error:
        return error
