"""The sizes index: one pass over a dataset's headers, saved for the next run.

The pass goes part by part, by ranges of records or by shards. Each finished part is
saved, so that a pass resumes, and several processes share one. The parts become one
file, `sizes-ID.arrays`, which is mapped into memory, so that even 10^9 images open at
once. If something could not be read, `unreadable-ID.txt` lists it (see
`navit/sources/cache.py` for where they are).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from navit.sources import cache
from navit.sources.cache import Place, find_beside, write_beside
from navit.sources.index_join import Index, join
from navit.sources.index_part import Entry, Part, State, is_whole, read_entries
from navit.sources.mapped import Stored

log = logging.getLogger("navit")

# Reading fewer headers than this takes about a second: not worth a file.
MIN_KEPT = 1000
# A part has at least this many records, if there are not more parts than that.
SAVE_EVERY, _PARTS = 20_000, 1000
# Records of a part that are read at the same time.
_THREADS = 32


class Share(NamedTuple):
    """What a process reads, and for whom.

    Attributes:
      again: read also what is saved.
      process, processes: read every `processes`-th part, from `process` on.
      publish: save the index of remote data beside it too, for other hosts.
    """

    again: bool = False
    process: int = 0
    processes: int = 1
    publish: bool = False


ALL = Share()


class Unfinished(Exception):
    """This process is done, and others are not."""


class Pass(NamedTuple):
    """How to read a dataset's headers.

    Attributes:
      part: makes a part by its number; it should give up if the event is set.
      counts: the number of units in each part.
      unit: what the progress bar counts.
      ahead: parts that are made at the same time.
    """

    part: Callable[[int, threading.Event], Part]
    counts: Sequence[int]
    unit: str = "images"
    ahead: int = 1


def measure(
    inspect: Callable[[int], Entry],
    name: Callable[[int], str],
    count: int,
    place: Place,
    *,
    share: Share = ALL,
) -> Index:
    """The index of `count` records, as `build` makes it, in ranges of records.

    Raises:
      ValueError: if there is no record, and as `build`.
    """
    size = max(SAVE_EVERY, -(-count // _PARTS))
    counts = [min(size, count - start) for start in range(0, count, size)]

    def part(number: int, stopped: threading.Event) -> Part:
        del stopped
        start = number * size
        return Part(counts[number], lambda i: inspect(start + i), count - 1 - start)

    if not count:
        raise ValueError(f"{place.identity} has no records")
    return build(Pass(part, counts), lambda _, i: name(i), place, share=share)


def build(
    work: Pass,
    name: Callable[[Index, int], str] | None,
    place: Place,
    *,
    share: Share = ALL,
) -> Index:
    """The index of all parts: read from its file, or made and saved there.

    A record whose `inspect` raises ValueError or OSError is left out, listed and
    counted. A transient error, such as a server's, must come twice, and a later record
    must be readable; otherwise the pass stops. A pass that stopped or was interrupted
    resumes from what it saved.

    A reader must not answer from memory after a failed read: records that are readable
    then show that there is a connection.

    Args:
      name: names a record; None if records that cannot be used are no matter.
      share: which parts to read. The process that finds those of all joins them.

    Raises:
      ValueError: if no record can be used.
      OSError: for too many open files, no connection, and the like.
      Unfinished: if parts of other processes are not there yet.
    """
    stored = None if share.again else cache.read_arrays(place, "sizes")
    made = stored is None
    if stored is None:
        stored = _made(work, place, share)
    index = Index.of(stored)
    if name is None:
        return index
    if made:
        _report(index, name, place, stored.path is not None)
    listed, bad = find_beside(place, "unreadable", ".txt"), index.left_out
    if bad > 10 or (bad and listed):  # fewer were named one by one
        remedy = "navit index --again reads them again"
        where = f", listed in {listed} ({remedy})" if listed else ""
        log.warning("%d of %d records are left out%s", bad, index.count, where)
    if index.count and not len(index.sizes):
        raise ValueError(
            f"not one of the {index.count} records of {place.identity} is readable; "
            f"the first: {index.reason(0)}"
        )
    return index


def _made(work: Pass, place: Place, share: Share) -> Stored:
    """Reads this process's parts and joins all."""
    numbers = range(share.process, len(work.counts), share.processes)
    if share.again:  # so that no process joins those from before
        cache.remove_parts(place, "sizes", numbers)
    whole: set[int] = set()
    states: dict[int, State] = {}
    before = 0
    if not share.again:
        cache.fetch_parts(place, "sizes", [*numbers])
    for n in () if share.again else numbers:
        if part := cache.read_arrays(place, "sizes", part=n):
            before += part.facts["done"]
            if is_whole(part):
                whole.add(n)
            else:
                states[n] = State.of(part)
    if before:
        log.info("indexing resumes after %d images", before)
    keep = share.again or share.processes > 1 or before > 0
    writer = _Writer(place, keep, share.publish and share.processes > 1)
    _read(work, [n for n in numbers if n not in whole], states, writer, len(numbers))
    return _joined(work, place, share, writer)


class _Writer:
    """Saves parts, once there are enough records or the index is asked for.

    Attributes:
      parts: those that are not saved, by number.
    """

    def __init__(self, place: Place, keep: bool, publish: bool) -> None:
        self._place, self.keep, self._publish = place, keep, publish
        self.parts: dict[int, tuple[State, dict[str, np.ndarray]]] = {}
        self._seen = 0

    def expect(self, count: int) -> None:
        self._seen += count
        self.keep = self.keep or self._seen >= MIN_KEPT

    def add(self, number: int, state: State, columns: dict[str, np.ndarray]) -> None:
        self.parts[number] = state, columns
        for other, (state, columns) in [*self.parts.items()]:
            if not self.keep:
                break
            saved = state.save(self._place, other, columns, keep=True)
            if saved.path is None:
                self.keep = False  # no folder can be written to
                break
            del self.parts[other]
            self._publish = self._publish and cache.publish(self._place, saved)


def _read(
    work: Pass, todo: list[int], states: dict[int, State], writer: _Writer, total: int
) -> None:
    queue, stopped = iter(todo), threading.Event()
    waiting: dict[Future[Part], int] = {}
    by_part, images = work.unit != "images", 0
    begun = sum(state.done for state in states.values())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=total if by_part else sum(work.counts),
                initial=total - len(todo) if by_part else begun,
                desc="indexing",
                unit=f" {work.unit}",
                delay=2,
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        makers = stack.enter_context(ThreadPoolExecutor(work.ahead))
        stack.callback(makers.shutdown, wait=False, cancel_futures=True)
        stack.callback(stopped.set)
        while True:
            while len(waiting) < work.ahead and (n := next(queue, None)) is not None:
                waiting[makers.submit(work.part, n, stopped)] = n
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                n, part = waiting.pop(future), future.result()
                state = states.pop(n, None) or State(part.count)
                writer.expect(part.count)
                try:
                    for step in read_entries(state, part, pool):
                        images += step
                        bar.update(0 if by_part else step)
                finally:  # also if interrupted
                    # Columns are of the whole part, and those of a shard quickly read.
                    if state.done == state.count or (state.done and not part.columns):
                        writer.add(n, state, part.columns)
                if by_part:
                    bar.set_postfix(images=images, refresh=False)
                    bar.update(1)


def _joined(work: Pass, place: Place, share: Share, writer: _Writer) -> Stored:
    """The index of all parts.

    Raises:
      Unfinished: if some are missing.
    """

    def part(number: int) -> Stored:
        if number in writer.parts:
            state, columns = writer.parts[number]
            return state.save(place, number, columns, keep=False)
        found = cache.read_arrays(place, "sizes", part=number)
        if found is None or not is_whole(found):
            raise LookupError(number)
        return found

    count = len(work.counts)
    if share.processes > 1:
        cache.fetch_parts(place, "sizes", range(count))
    try:
        stored = join(part, count, place, keep=writer.keep)
    except LookupError:
        # Another process may have joined them meanwhile, and removed the parts. With
        # `again`, what is there may be the index from before.
        if not share.again and (whole := cache.read_arrays(place, "sizes")):
            return whole
        has_parts = share.process < count
        state = "is done, and others are not" if has_parts else "has nothing to read"
        raise Unfinished(
            f"{place.identity}: process {share.process} of {share.processes} {state}; "
            f"the last makes the index of their {count} parts "
            f"({cache.shared(place)})"
        ) from None
    if share.publish:
        cache.publish(place, stored)
    cache.remove_all_parts(place, "sizes")
    return stored


def _report(
    index: Index, name: Callable[[Index, int], str], place: Place, keep: bool
) -> None:
    bad = index.unreadable
    lines = [f"{name(index, i)}: {reason}" for i, reason in bad.items()]
    for line in lines[:10]:
        log.warning("left out, unreadable: %s", line)
    if keep and (bad or find_beside(place, "unreadable", ".txt")):
        write_beside(place, "unreadable", ".txt", "\n".join(lines).encode())
