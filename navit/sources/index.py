"""The sizes index: one pass over a dataset's headers, saved for the next run.

An index is two files: `sizes-ID.npz` and, if something could not be read,
`unreadable-ID.txt` (see `navit/sources/cache.py` for where they are).
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from navit.sources.cache import (
    Place,
    find_beside,
    read_arrays,
    write_arrays,
    write_beside,
)
from navit.sources.images import ImageLike, size_of
from navit.sources.transient import is_exhausted, is_transient

log = logging.getLogger("navit")

# Reading fewer headers than this takes about a second: not worth a file.
MIN_KEPT = 1000
# Progress is saved after at least this many records.
SAVE_EVERY = 20_000


class Entry(NamedTuple):
    """One record in the index."""

    height: int
    width: int
    label: str = ""
    text: int = 0  # crc32 of the captions

    @staticmethod
    def of(image: ImageLike, label: str = "", captions: Iterable[str] = ()) -> Entry:
        """Makes the entry; raises ValueError if `image` is not an image."""
        height, width = size_of(image)
        text = "\0".join(captions)
        check = zlib.crc32(text.encode(errors="replace"))  # half a surrogate pair
        return Entry(height, width, label, check)


class Index(NamedTuple):
    """One entry per record.

    Attributes:
      sizes: `[m, 2]` int32 (height, width), upright; (0, 0) if unreadable.
      labels: `[m]` bytes, empty if there is none.
      texts: `[m]` uint32, checksums of the captions.
      unreadable: record -> reason, for each that cannot be used.
    """

    sizes: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    unreadable: dict[int, str]

    @property
    def kept(self) -> np.ndarray:
        """The usable records, in order."""
        return np.flatnonzero(self.sizes[:, 0])

    def describe(self) -> str:
        """`N images (... digest)` of the usable records: the same wherever they are."""
        kept = self.kept
        digest = hashlib.sha256()
        for column, dtype in ((self.sizes, "<i4"), (self.texts, "<u4")):
            digest.update(np.ascontiguousarray(column[kept], dtype).tobytes())
        digest.update(b"\0".join(self.labels[kept].tolist()))
        return f"{len(kept)} images (sizes and texts {digest.hexdigest()[:16]})"


def measure(
    inspect: Callable[[int], Entry],
    name: Callable[[int], str],
    count: int,
    place: Place,
    *,
    again: bool = False,
) -> Index:
    """The index of `count` records: read from its file, or made and saved there.

    A record whose `inspect` raises ValueError or OSError is left out, listed and
    counted. A transient error, such as a server's, must come twice, and a later record
    must be readable; otherwise the pass stops. A pass that stopped or was interrupted
    resumes from what it saved.

    A reader must not answer from memory after a failed read: records that are readable
    then show that there is a connection.

    Args:
      again: read every record even if there is an index.

    Raises:
      ValueError: if no record can be used.
      OSError: for too many open files, no connection, and the like.
    """
    state = None if again else _load(place, count)
    if state is None:
        state = _State(count)
    keep, made = again or count >= MIN_KEPT, state.done < count
    if state.done and made:
        log.info("indexing resumes from image %d of %d", state.done, count)
    if made:
        _fill(state, inspect, count, place, keep=keep)
    index = state.index()
    if made:
        _report(index, name, place, keep)
    listed, bad = find_beside(place, "unreadable", ".txt"), len(index.unreadable)
    if bad > 10 or (bad and listed):  # fewer were named one by one
        remedy = "navit index --again reads them again"
        where = f", listed in {listed} ({remedy})" if listed else ""
        log.warning("%d of %d records are left out%s", bad, count, where)
    if not count:
        raise ValueError(f"{place.identity} has no records")
    if not len(index.kept):
        reason = next(iter(index.unreadable.values()))
        raise ValueError(
            f"not one of the {count} records of {place.identity} is readable; the "
            f"first: {reason}"
        )
    return index


class _State:
    """An unfinished index, of the first `done` records."""

    def __init__(self, count: int) -> None:
        self.done = 0
        self.sizes = np.zeros((count, 2), np.int32)
        self.texts = np.zeros(count, np.uint32)
        self.labels: list[bytes] = []
        self.unreadable: dict[int, str] = {}

    def add(self, records: Iterable[Entry | str]) -> None:
        for record in records:
            if isinstance(record, str):
                self.unreadable[self.done] = record
                self.labels.append(b"")
            else:
                self.sizes[self.done] = record.height, record.width
                self.texts[self.done] = record.text
                self.labels.append(record.label.encode(errors="replace"))
            self.done += 1

    def index(self) -> Index:
        labels = np.array(self.labels, "S")
        return Index(self.sizes, labels, self.texts, self.unreadable)


def _fill(
    state: _State,
    inspect: Callable[[int], Entry],
    count: int,
    place: Place,
    *,
    keep: bool,
) -> None:
    def one(record: int) -> Entry | str | BaseException:
        """A transient error is returned as it is, and of others the reason."""
        try:
            return inspect(record)
        except (ValueError, OSError, RecursionError) as error:
            if is_exhausted(error):
                raise error.__cause__ or error from None
            return (error.__cause__ or error) if is_transient(error) else _reason(error)

    def read(batch: range) -> Iterator[Entry | str]:
        """Yields the records up to the last readable one; the next step has the rest.

        Failed records before it are tried again, and left out if they fail again. If a
        whole step failed, the dataset's last record must be readable instead.
        """
        results = pool.map(one, batch)
        for result in results:
            if isinstance(result, BaseException):
                break
            yield result
        else:
            return
        record = state.done  # the one that failed, as all before it are added
        rest = dict(zip(range(record, batch.stop), [result, *results], strict=True))
        good = [i for i, x in rest.items() if isinstance(x, Entry)]
        end = good[-1] + 1 if good else batch.stop
        if batch.stop == count:  # no record comes later: an earlier one must do
            good += np.flatnonzero(state.sizes[: state.done, 0])[-1:].tolist()
            end = count
        elif not good and record > batch.start:
            return
        failed = [i for i in range(record, end) if isinstance(rest[i], BaseException)]
        rest |= zip(failed, pool.map(one, failed), strict=True)
        if not isinstance(one(good[0] if good else count - 1), Entry):
            raise result  # there is no connection: resume later
        for x in [*rest.values()][: end - record]:
            yield _reason(x) if isinstance(x, BaseException) else x

    chunk = max(SAVE_EVERY, count // 50)
    threads = min(32, 4 * (os.cpu_count() or 1))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=count,
            initial=state.done,
            desc="indexing",
            unit=" images",
            delay=2,
        ) as bar,
    ):
        saved = state.done
        try:
            while state.done < count:
                # In steps, so that the bar moves and Ctrl-C takes effect.
                batch = range(state.done, min(count, state.done + 256))
                state.add(read(batch))
                bar.update(state.done - batch.start)
                if keep and state.done - saved >= chunk:
                    _save(state, place)
                    saved = state.done
        finally:  # also if interrupted
            if keep and state.done > saved:
                _save(state, place)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _report(index: Index, name: Callable[[int], str], place: Place, keep: bool) -> None:
    bad = index.unreadable
    lines = [f"{name(i)}: {reason}" for i, reason in bad.items()]
    for line in lines[:10]:
        log.warning("left out, unreadable: %s", line)
    if keep and (bad or find_beside(place, "unreadable", ".txt")):
        write_beside(place, "unreadable", ".txt", "\n".join(lines).encode())


def _save(state: _State, place: Place) -> None:
    done = state.done
    unreadable = {i: reason for i, reason in state.unreadable.items() if i < done}
    write_arrays(
        place,
        "sizes",
        done=np.array(done),
        sizes=state.sizes,
        texts=state.texts,
        labels=np.array(state.labels[:done], "S"),
        bad=np.array(list(unreadable), np.int64),
        reasons=np.array(list(unreadable.values()), "U"),
    )


def _load(place: Place, count: int) -> _State | None:
    arrays = read_arrays(place, "sizes")
    if arrays is None or len(arrays["sizes"]) != count:
        return None
    state = _State(count)
    state.done = int(arrays["done"])
    state.sizes, state.texts = arrays["sizes"], arrays["texts"]
    state.labels = arrays["labels"].tolist()
    reasons = arrays["reasons"].tolist()
    state.unreadable = dict(zip(arrays["bad"].tolist(), reasons, strict=True))
    return state
