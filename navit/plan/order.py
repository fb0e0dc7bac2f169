"""The parts of a mixture, and the random order of an epoch's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from navit.plan import sampling

# The number of this kind of draw in the random key. Each kind has its own, and they
# start at 1, as numpy ignores trailing zeros of a key.
ORDER = 1


@dataclasses.dataclass(frozen=True)
class Part:
    """Records `offset` to `offset + count` of a mixture, and their share of it.

    Attributes:
      ends: `[c]` records of the part up to the end of each of its chunks
        (`navit.plan.lanes.chunk_ends`); None ends them every `data.chunk` records.
    """

    offset: int
    count: int
    weight: float
    ends: np.ndarray | None = dataclasses.field(default=None, compare=False)


def part_shares(parts: Sequence[Part], count: int) -> list[int]:
    """The images an epoch takes from each part: as many as the scarcest allows."""
    if not parts:
        return [count]
    total = sum(part.weight for part in parts)
    least = min(part.count * total / part.weight for part in parts)
    shares = [
        min(part.count, int(least * part.weight / total + 1e-6)) for part in parts
    ]
    if 0 in shares:
        i = shares.index(0)
        raise ValueError(
            f"source {i} of the mixture has weight {parts[i].weight:g} of {total:g}, "
            f"which gives it no image in an epoch of {sum(shares)}: raise its weight"
        )
    return shares


def records_at(
    positions: np.ndarray, parts: Sequence[Part], shares: list[int], key: list[int]
) -> np.ndarray:
    """The records at `positions` `[m]` of an epoch's order; int64 `[m]`."""
    drawn = sampling.shuffled(positions, sum(shares), [*key, 1])
    records = drawn.copy()
    ends = np.cumsum(shares)
    for i, part in enumerate(parts):
        in_part = (drawn >= ends[i] - shares[i]) & (drawn < ends[i])
        within = drawn[in_part] - (ends[i] - shares[i])
        # Each epoch chooses other records, and none twice.
        records[in_part] = part.offset + sampling.shuffled(
            within, part.count, [*key, i + 2]
        )
    return records
