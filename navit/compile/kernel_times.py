"""How long a Pallas TPU kernel takes, from the schedule that the compiler dumps.

The TPU compiler's own cost figures leave out custom kernels (a backward pass counts 0).
With these options, which libtpu reads once when it loads, it writes the final schedule
of everything it compiles: one file per instruction of the program, one line per bundle
of a kernel. One bundle is issued per cycle.

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"

A compile writes 75 to 400 MB there: use a temporary folder, and delete it. The schedule
does not include stalls: waiting for memory, or for other cores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_FILE = re.compile(r"^\d+-(?!.*schedule-analysis).*-final_bundles\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:")
_ENTRY = re.compile(r"entry bundle: %([\w.\-]+) = custom-call\(")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_JUMP = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_EXIT = re.compile(r"(\d+) /\* loop exit test")
_STAGE = re.compile(r"iteration index, stage = (\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of one kernel, in bundles; each one is a cycle.

    Attributes:
      turn: bundles of one turn of the grid loop with all its branches taken.
      steps: steps of the grid; None if it is dynamic, known only at run time.
      fill: additional turns, in which the pipeline of copies fills and drains.
      body: the part of a turn that those additional turns jump over.
      branches: the parts of `body` that a step may jump over, in order: `pl.when`.
      around: bundles outside the loop, which run once.
    """

    turn: int
    steps: int | None
    fill: int
    body: int
    branches: tuple[int, ...]
    around: int

    def cycles(
        self,
        steps: float | int | None = None,
        *,
        taken: Sequence[float | int] | None = None,
    ) -> float:
        """Cycles of one call.

        Args:
          steps: steps of the grid; required if the grid is dynamic.
          taken: the share of steps that run each of `branches`; None if all do. A loop
            whose length is known only at run time is a branch too, and its share is the
            mean number of its turns.

        Raises:
          ValueError: if the grid is dynamic and `steps` is not given, or if `taken` and
            `branches` differ in length.
        """
        steps = self.steps if steps is None else steps
        if steps is None:
            raise ValueError("the grid is dynamic: pass how many steps it runs")
        shares = [1.0] * len(self.branches) if taken is None else list(taken)
        if len(shares) != len(self.branches):
            raise ValueError(
                f"taken has {len(shares)} shares for {len(self.branches)} branches"
            )
        jumped = sum(
            (1 - share) * length
            for share, length in zip(shares, self.branches, strict=True)
        )
        idle = self.fill * (self.turn - self.body)
        return float(self.around + idle + steps * (self.turn - jumped))


def skipping(kernel: Kernel, steps: int, visited: float) -> tuple[float, ...] | None:
    """`taken` for the kernels of `splash_skip`, which loop over blocks of keys.

    None if the compiler made other branches than libtpu 0.0.41 does.

    Args:
      steps: blocks of queries in a row.
      visited: blocks of keys that each of them visits on average.
    """
    once = 1 / steps
    # The backward pass clears its sums in the first step and writes them in the last.
    # The forward pass has the loop and, for some rows, a few bundles beside it.
    shares = {1: (visited,), 2: (visited, 1.0), 3: (once, visited, once)}
    return shares.get(len(kernel.branches))


def kernel_cycles(dump_dir: Path) -> dict[str, Kernel]:
    """The kernels in a dump of the compiler, by their instruction's name in the HLO.

    XLA's own fusions in the dump are left out: the HLO text has their
    `estimated_cycles`.
    """
    kernels: dict[str, Kernel] = {}
    for path in sorted(dump_dir.iterdir()):
        if not _FILE.match(path.name):
            continue
        with path.open() as lines:
            name = next((m[1] for line in lines if (m := _ENTRY.search(line))), None)
        if name is not None:
            kernels[name] = _kernel(path)
    return kernels


def _bundles(path: Path) -> Iterator[tuple[int, str]]:
    """(address, text) of every line; a bundle's text may span several lines."""
    address = None
    with path.open() as lines:
        for line in lines:
            if match := _BUNDLE.match(line):
                address = int(match[1], 16)
            if address is not None:
                yield address, line


def _kernel(path: Path) -> Kernel:
    starts: dict[int, int] = {}
    jumps: list[tuple[int, int]] = []
    exits: list[tuple[int, int]] = []
    last = stages = 0
    for last, text in _bundles(path):
        for region in _START.findall(text):
            starts.setdefault(int(region), last)
        jumps += [(last, int(region)) for region in _JUMP.findall(text)]
        exits += [(last, int(count)) for count in _EXIT.findall(text)]
        stages = max([stages, *map(int, _STAGE.findall(text))])
    # Loops as (start, address of the jump back), and skipped ranges as (start, end)
    # without the end.
    loops = [(starts[r], at) for at, r in jumps if starts.get(r, at) < at]
    skips = [(at + 1, starts[r]) for at, r in jumps if starts.get(r, at) > at]
    if not loops:
        return Kernel(last + 1, 1, 0, last + 1, (), 0)

    low, high = max(loops, key=lambda loop: loop[1] - loop[0])
    turns = _turns(low, high, exits)
    # A loop within a step counts as often as it runs, or once if that is unknown.
    inner = [x for x in loops if x != (low, high) and low <= x[0] and x[1] <= high]
    more = {x: ((_turns(*x, exits) or 1) - 1) * (x[1] - x[0] + 1) for x in inner}

    def length(start: int, end: int) -> int:
        within = (n for (a, b), n in more.items() if start <= a and b < end)
        return end - start + sum(within)

    inside = [x for x in skips if low <= x[0] and x[1] <= high]
    body = [x for x in inside if x[1] - x[0] > (high - low) / 2 and stages]
    whole = max(body, key=lambda x: x[1] - x[0]) if body else (low, high + 1)
    inside = [x for x in inside if x != whole and whole[0] <= x[0] and x[1] <= whole[1]]
    outermost = [
        x
        for x in inside
        if not any(y != x and y[0] <= x[0] and x[1] <= y[1] for y in inside)
    ]
    fill = stages if body else 0
    return Kernel(
        turn=length(low, high + 1),
        steps=None if turns is None else turns - fill,
        fill=fill,
        body=length(*whole),
        branches=tuple(length(*x) for x in sorted(outermost)),
        around=last - (high - low),
    )


def _turns(low: int, high: int, exits: list[tuple[int, int]]) -> int | None:
    """The constant in a loop's exit test, which is near the loop's end."""
    within = [count for at, count in exits if low <= at <= high]
    at = max((at for at, _ in exits if low <= at <= high), default=0)
    return within[-1] if within and high - at <= 16 else None
