"""Reads the headers of one part of a dataset, for the sizes index."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from navit.sources.cache import Place, write_arrays
from navit.sources.images import ImageLike, size_of
from navit.sources.mapped import Stored
from navit.sources.transient import is_exhausted, is_transient

# Records that are read between two updates of the progress bar.
_STEP = 256


class Entry(NamedTuple):
    """One record in the index."""

    height: int
    width: int
    label: str = ""
    text: int = 0  # crc32 of the captions

    @staticmethod
    def of(image: ImageLike, label: str = "", captions: Iterable[str] = ()) -> Entry:
        """Makes the entry; raises ValueError if `image` is not an image."""
        return Entry.sized(*size_of(image), label, captions)

    @staticmethod
    def sized(
        height: int, width: int, label: str = "", captions: Iterable[str] = ()
    ) -> Entry:
        """Makes the entry of an image of this size."""
        text = "\0".join(captions)
        check = zlib.crc32(text.encode(errors="replace"))  # half a surrogate pair
        return Entry(height, width, label, check)


@dataclasses.dataclass(frozen=True)
class Part:
    """Records that are indexed and saved together.

    Attributes:
      inspect: the entry of a record, by its number in this part.
      last: the number of the dataset's last record, counted from this part's first.
      columns: further arrays to save; of all parts, one after the other.
    """

    count: int
    inspect: Callable[[int], Entry]
    last: int
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class State:
    """The entries of a part's first `done` records."""

    def __init__(self, count: int) -> None:
        self.done, self.count = 0, count
        self.sizes = np.zeros((count, 2), np.int32)
        self.texts = np.zeros(count, np.uint32)
        self.labels: list[bytes] = []
        self.unreadable: dict[int, str] = {}

    @staticmethod
    def of(stored: Stored) -> State:
        """What was saved, to go on with."""
        arrays, state = stored.arrays, State(stored.facts["count"])
        state.done = stored.facts["done"]
        state.sizes[:], state.texts[:] = arrays["sizes"], arrays["texts"]
        state.labels = arrays["labels"].tolist()
        reasons = [reason.decode() for reason in arrays["reasons"].tolist()]
        state.unreadable = dict(zip(arrays["bad"].tolist(), reasons, strict=True))
        return state

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

    def save(
        self, place: Place, number: int, columns: dict[str, np.ndarray], *, keep: bool
    ) -> Stored:
        """Saves the entries as a part, or only returns them."""
        reasons = [x.encode(errors="replace") for x in self.unreadable.values()]
        arrays = {
            "sizes": self.sizes,
            "texts": self.texts,
            "labels": np.array(self.labels, "S"),
            "bad": np.array([*self.unreadable], np.int64),
            "reasons": np.array(reasons, "S"),
            **columns,
        }

        def fill(saved: dict[str, np.ndarray]) -> dict[str, int]:
            for name, array in arrays.items():
                saved[name][...] = array
            return {"count": self.count, "done": self.done}

        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        return write_arrays(place, "sizes", shapes, fill, part=number, keep=keep)


def is_whole(part: Stored) -> bool:
    return part.facts["done"] == part.facts["count"]


def read_entries(state: State, part: Part, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Adds the part's other records to `state`; yields how many, step by step."""

    def one(record: int) -> Entry | str | BaseException:
        """A transient error is returned as it is, and of others the reason."""
        try:
            return part.inspect(record)
        except (ValueError, OSError, RecursionError) as error:
            if is_exhausted(error):
                raise error.__cause__ or error from None
            return (error.__cause__ or error) if is_transient(error) else reason(error)

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
        if batch.stop > part.last:  # no record comes later: an earlier one must do
            good += np.flatnonzero(state.sizes[: state.done, 0])[-1:].tolist()
            end = batch.stop
        elif not good and record > batch.start:
            return
        failed = [i for i in range(record, end) if isinstance(rest[i], BaseException)]
        rest |= zip(failed, pool.map(one, failed), strict=True)
        if not isinstance(one(good[0] if good else part.last), Entry):
            raise result  # there is no connection: resume later
        for x in [*rest.values()][: end - record]:
            yield reason(x) if isinstance(x, BaseException) else x

    while state.done < part.count:
        # In steps, so that the bar moves and Ctrl-C takes effect.
        first = state.done
        state.add(read(range(first, min(part.count, first + _STEP))))
        yield state.done - first


def reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
