"""The parts of a sizes index become one, without holding it in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from navit.sources.cache import Place, write_arrays
from navit.sources.mapped import Stored

# Records that are in memory at a time.
_AT_ONCE = 2**20

_OF_A_PART = ("sizes", "texts", "labels", "bad", "reasons")


@dataclasses.dataclass(frozen=True)
class Index:
    """The usable records of a dataset.

    Attributes:
      sizes: `[m, 2]` int32 (height, width), upright.
      labels: `[m]` int32, the label itself or its place in `words`; -1 for none.
      words: `[w]` bytes, the different labels in order; empty if all are integers.
      bad_after: `[r]` int64, ascending: usable records before each unusable one.
      reasons: `[r]` bytes, why each of these cannot be used.
      columns: what the parts have besides, one after the other; `ends` `[p]` has the
        records up to the end of each part.
      count: all records.
      described: `N images (... digest)`, the same wherever they are.
      top: the greatest of `labels`; -1 if there is none.
    """

    sizes: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    bad_after: np.ndarray
    reasons: np.ndarray
    columns: dict[str, np.ndarray]
    count: int
    described: str
    top: int

    @staticmethod
    def of(stored: Stored) -> Index:
        own = ("sizes", "labels", "words", "bad_after", "reasons")
        arrays: dict[str, Any] = {name: stored.arrays[name] for name in own}
        columns = {n: a for n, a in stored.arrays.items() if n not in own}
        return Index(**arrays, columns=columns, **stored.facts)

    @property
    def left_out(self) -> int:
        return len(self.bad_after)

    def records(self, usable: np.ndarray) -> np.ndarray:
        """The records that the usable ones of these numbers are; int64 `[k]`."""
        return usable + np.searchsorted(self.bad_after, usable, "right")

    def usable(self, records: np.ndarray) -> np.ndarray:
        """How many usable records come before the records `[k]`; int64 `[k]`."""
        bad = self.bad_after + np.arange(self.left_out)
        return records - np.searchsorted(bad, records)

    def reason(self, number: int) -> str:
        """Why the unusable record of this number cannot be used."""
        return self.reasons[number].decode(errors="replace")

    @property
    def unreadable(self) -> dict[int, str]:
        """Unusable record -> reason."""
        bad = (self.bad_after + np.arange(self.left_out)).tolist()
        return {record: self.reason(i) for i, record in enumerate(bad)}


def join(
    part: Callable[[int], Stored], count: int, place: Place, *, keep: bool
) -> Stored:
    """Joins the parts `0` to `count - 1`, and saves the whole with `keep`.

    Raises:
      LookupError: if `part` does.
    """
    ends, bad, words = np.zeros(count, np.int64), 0, set[bytes]()
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for number in range(count):
        arrays, facts, _ = part(number)
        ends[number] = facts["count"]
        bad += len(arrays["bad"])
        words.update(np.unique(arrays["labels"]).tolist())
        for name, array in arrays.items():
            if name in _OF_A_PART and name != "reasons":
                continue
            dtype, shape = shapes.get(name, (array.dtype, (0, *array.shape[1:])))
            length = shape[0] + len(array)
            shapes[name] = np.promote_types(dtype, array.dtype), (length, *shape[1:])
    ends = np.cumsum(ends)
    total = int(ends[-1])
    labels = _Labels(words - {b""})
    table = np.array(labels.table, "S")
    shapes |= {
        "sizes": (np.dtype(np.int32), (total - bad, 2)),
        "labels": (np.dtype(np.int32), (total - bad,)),
        "bad_after": (np.dtype(np.int64), (bad,)),
        "words": (table.dtype, table.shape),
        "ends": (ends.dtype, ends.shape),
    }

    def fill(whole: dict[str, np.ndarray]) -> dict[str, Any]:
        whole["words"][:], whole["ends"][:] = table, ends
        at = dict.fromkeys(shapes, 0)

        def put(name: str, values: np.ndarray) -> None:
            whole[name][at[name] : at[name] + len(values)] = values
            at[name] += len(values)

        with tempfile.TemporaryFile() as file:  # not needed afterwards
            for number in range(count):
                arrays, _, _ = part(number)
                usable = np.ones(len(arrays["sizes"]), bool)
                usable[arrays["bad"]] = False
                before = np.cumsum(usable)
                put("bad_after", at["sizes"] + before[arrays["bad"]])
                put("sizes", arrays["sizes"][usable])
                put("labels", labels.numbers(arrays["labels"][usable]))
                file.write(arrays["texts"][usable].astype("<u4").tobytes())
                for name in arrays.keys() - {"sizes", "texts", "labels", "bad"}:
                    put(name, arrays[name])
            file.seek(0)
            texts = iter(lambda: file.read(4 * _AT_ONCE), b"")
            described = _described(whole["sizes"], texts, labels, whole["labels"])
        return {"count": total, "described": described, "top": labels.top}

    return write_arrays(place, "sizes", shapes, fill, keep=keep)


class _Labels:
    """Different labels, as numbers: integers stand for themselves.

    Attributes:
      table: the labels by their numbers; empty if all are integers.
      top: the greatest number; -1 if there is none.
    """

    def __init__(self, words: set[bytes]) -> None:
        self.table = sorted(words)
        self.top = len(words) - 1
        digits = all(x.isdigit() and len(x) < 10 and x == b"%d" % int(x) for x in words)
        if digits and words:
            self.top = max(map(int, words))
            self.table = []

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        present = labels != b""
        found = np.full(len(labels), -1, np.int32)
        if self.table:
            found[present] = np.searchsorted(np.array(self.table), labels[present])
        else:
            found[present] = labels[present].astype(np.int32)
        return found

    def texts(self, numbers: np.ndarray) -> list[bytes]:
        if self.table:
            return np.array([*self.table, b""])[numbers].tolist()
        return [b"" if x < 0 else b"%d" % x for x in numbers.tolist()]


def _described(
    sizes: np.ndarray, texts: Iterator[bytes], labels: _Labels, numbers: np.ndarray
) -> str:
    checksum = hashlib.sha256()
    starts = range(0, len(sizes), _AT_ONCE)
    for start in starts:
        some = sizes[start : start + _AT_ONCE]
        checksum.update(np.ascontiguousarray(some, "<i4").tobytes())
    for data in texts:
        checksum.update(data)
    for start in starts:
        texts_of = labels.texts(numbers[start : start + _AT_ONCE])
        checksum.update(b"\0" * (start > 0) + b"\0".join(texts_of))
    return f"{len(sizes)} images (sizes and texts {checksum.hexdigest()[:16]})"
