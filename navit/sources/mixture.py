"""Several sources as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from navit.sources.cache import Place, digest, read_arrays, write_arrays
from navit.sources.source import InPieces, Record, Source, Task

log = logging.getLogger("navit")

# Records whose sizes are held in memory, at 8 bytes each.
_IN_MEMORY = 10_000_000


class MixtureSource:
    """The images of all sources, one source after the other.

    The mixture has a task if all sources with that task number its classes alike;
    images of the other sources have the label -1.

    Attributes:
      sources: these sources.
      counts: the number of images in each source.
      shares: the share of an epoch's images drawn from each source; they sum to 1.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] = ()
    ) -> None:
        self.sources = tuple(sources)
        self.counts = [len(source) for source in sources]
        shares = np.array(weights or self.counts, np.float64)
        self.shares: list[float] = (shares / shares.sum()).tolist()
        self._offsets = np.cumsum([0, *self.counts[:-1]])
        self.sizes = self._joined("sizes", [source.sizes for source in sources])
        self.left_out = sum(source.left_out for source in sources)
        self.damaged = sum(source.damaged for source in sources)
        self.tasks = {}
        for name in dict.fromkeys(name for s in sources for name in s.tasks):
            tasks = [source.tasks.get(name) for source in sources]
            if len({task.class_names for task in tasks if task}) > 1:
                log.warning(
                    "the sources name the classes of %r differently, so the mixture "
                    "has no such task",
                    name,
                )
                continue
            labels = [
                task.labels if task else np.broadcast_to(np.int32(-1), count)
                for task, count in zip(tasks, self.counts, strict=True)
            ]
            names = next(task.class_names for task in tasks if task)
            self.tasks[name] = Task(names, self._joined(f"labels-{name}", labels))

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, index: int) -> Record:
        source, index = self._at(index)
        return source.record(index)

    def neighbours(self, indices: Sequence[int]) -> list[Record]:
        """Neighbouring records of one source, in ascending order."""
        source, first = self._at(indices[0])
        own = [index - indices[0] + first for index in indices]
        if isinstance(source, InPieces):
            return source.neighbours(own)
        return [source.record(index) for index in own]

    def name(self, index: int) -> str:
        source, index = self._at(index)
        return source.name(index)

    def fingerprint(self) -> str:
        """Changes with the sources, their order and their weights."""
        return " + ".join(
            f"{share:.6g} of {source.fingerprint()}"
            for share, source in zip(self.shares, self.sources, strict=True)
        )

    def version(self) -> str:
        return " ".join(source.version() for source in self.sources)

    def _joined(self, kind: str, arrays: list[np.ndarray]) -> np.ndarray:
        """One int32 array of all sources: in memory, or in the cache if it is large."""
        if sum(map(len, arrays)) < _IN_MEMORY:
            return np.concatenate(arrays).astype(np.int32)
        versions = [[source.fingerprint(), source.version()] for source in self.sources]
        place = Place(None, digest(versions), "")
        if stored := read_arrays(place, f"mixture-{kind}"):
            return stored.arrays["joined"]

        def fill(whole: dict[str, np.ndarray]) -> dict:
            np.concatenate(arrays, out=whole["joined"], casting="unsafe")
            return {}

        shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
        shapes = {"joined": (np.dtype(np.int32), shape)}
        return write_arrays(place, f"mixture-{kind}", shapes, fill).arrays["joined"]

    def _at(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(np.searchsorted(self._offsets, index, "right")) - 1
        return self.sources[part], index - int(self._offsets[part])
