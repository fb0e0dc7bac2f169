"""Reads time and communication from the TPU compiler's optimized program.

The compiler writes the cycles that it estimates for every operation into the program's
text. An operation in a loop runs once per trip. The sum leaves out stalls, overlap and
the time on the wire, so use it to rank programs, not to time them. `cost_analysis()` is
of no use here: it counts a loop's body once, and -1 s for operations it does not know.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?([%\w.\-, ]+)\}?")
# Estimates from here on mean that the compiler does not know.
_UNPRICED = 2**60


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the program.

    Attributes:
      scope: the names of the functions and scopes around it in the source.
      cycles: the estimate for one run; 0 if the compiler gives none.
      products: floating point operations of its matrix products, if it has no cycles:
        operations fused with communication, and kernels that declare their FLOPs.
      runs: how many times it runs in a step.
      kernel: the name of a Pallas kernel, which has no cycles either
        (`navit.compile.kernel_times`), or of a routine of a GPU's library.
      taken: the share of steps that run each branch of a kernel, if it declares them.
      collectives: communication, either this operation or fused into it.
    """

    name: str
    opcode: str
    scope: str
    cycles: int
    products: float
    runs: int
    kernel: str
    taken: tuple[float, ...]
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication: `bytes` of the whole array on one device, `runs` times a step."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    runs: int
    scope: str


def operations(hlo: str) -> list[Operation]:
    """Every operation that runs, including those in loops and branches.

    Args:
      hlo: `compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry, or a loop has no trip count.
    """
    computations: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            current = ""
        elif current and line[:1].isspace():
            computations[current].append(line)
        elif current and line and (lines := computations[current]):
            lines[-1] += line  # a kernel's metadata spans several lines
    if not entry:
        raise ValueError("this is no optimized HLO text: it has no ENTRY")
    return list(_walk(computations, entry, 1))


def _walk(
    computations: dict[str, list[str]], computation: str, runs: int
) -> Iterator[Operation]:
    for line in computations[computation]:
        match = _OPERATION.match(line)
        if not match:
            continue
        name, _, opcode = match.groups()
        if opcode == "while":
            loop = re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", line)
            assert loop is not None
            trips = _trips(computations, line, loop[1])
            yield from _walk(computations, loop[2], runs * trips)
            continue
        called = _called(line)
        if opcode in ("call", "conditional", "async-start"):
            for each in called[:1] if opcode == "conditional" else called:
                yield from _walk(computations, each, runs)
            continue
        cycles = _first(r'"estimated_cycles":"(\d+)"', line)
        scope = _first(r'op_name="([^"]*)"', line)
        taken: tuple[float, ...] = ()
        kernel, products = "", 0.0
        if 'custom_call_target="tpu_custom_call"' in line:
            kernel = _first(r'kernel_name="?([\w.\-]+)', line) or name
            if shares := _first(r'"taken":\s*"([^"]*)"', line):
                taken = tuple(float(x) for x in shares.split())
                products = float(_first(r'"flops":"(\d+)"', line) or 0)
        elif target := _first(r'custom_call_target="(__[^"]+)"', line):
            kernel = _first(r', name = "(\w+)", num_stages', line) or target
        sent = list(_sent(line, runs, scope, computations[computation]))
        if opcode == "fusion":
            for each in called:
                lines = computations.get(each, [])
                inside = [x for y in lines for x in _sent(y, runs, scope, lines)]
                # A sum of which each device keeps a part is written as an all-reduce.
                scattered = each.startswith("all-reduce-scatter")
                for x in inside:
                    if scattered and x.kind == "all-reduce":
                        x = dataclasses.replace(x, kind="reduce-scatter")
                    sent.append(x)
        count = int(cycles or 0)
        count = count if count < _UNPRICED else 0
        yield Operation(
            name=name,
            opcode=opcode,
            scope=scope,
            cycles=count,
            products=products or (0.0 if count else _products(computations, called)),
            runs=runs,
            kernel=kernel,
            taken=taken,
            collectives=tuple(sent),
        )


def _sent(line: str, runs: int, scope: str, lines: list[str]) -> Iterator[Collective]:
    """The communication in one line of a computation."""
    match = _OPERATION.match(line)
    if not match:
        return
    kind = match[3].removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    types = match[2]
    if match[3] == "reduce-scatter":  # its operand has the whole shape
        operands = re.findall(r"%([\w.\-]+)", line[match.end() :].partition(")")[0])
        made = {m[1]: m[2] for x in lines if (m := _OPERATION.match(x))}
        types = " ".join(made.get(name, "") for name in operands) or types
    arrays = [
        (dtype, tuple(int(x) for x in sizes.split(",") if x))
        for dtype, sizes in _ARRAY.findall(types)
        if dtype in _BYTES
    ]
    if match[3].endswith("-start") and kind != "all-reduce":
        arrays = arrays[1:2]  # (operand, result, ...)
    for dtype, shape in arrays:
        yield Collective(
            kind=kind,
            dtype=dtype,
            shape=shape,
            bytes=_BYTES[dtype] * math.prod(shape),
            runs=runs,
            scope=_first(r'op_name="([^"]*)"', line) or scope,
        )


def _products(computations: dict[str, list[str]], called: list[str]) -> float:
    """Operations of the matrix products in computations: 2 * output size * k.

    With lhs [m, k], rhs [k, n] and out [m, n], k is the root of lhs * rhs / out. A
    batch dimension would make it too large, but products fused with communication
    (weights and their gradients) have none.
    """
    sizes: dict[str, int] = {}
    total = 0.0
    for line in (line for name in called for line in computations.get(name, [])):
        match = _OPERATION.match(line)
        if not match:
            continue
        arrays = _ARRAY.findall(match[2])
        if len(arrays) == 1:
            sizes[match[1]] = math.prod(int(x) for x in arrays[0][1].split(",") if x)
        if match[3] in ("convolution", "dot"):
            operands = line[match.end() : line.index(")", match.end())]
            names = [*re.findall(r"%([\w.\-]+)", operands)[:2], match[1]]
            if all(name in sizes for name in names):
                lhs, rhs, out = (sizes[name] for name in names)
                total += 2 * out * math.sqrt(lhs * rhs / out)
        elif match[3] == "fusion":
            total += _products(computations, _called(line))
    return total


def _called(line: str) -> list[str]:
    return [
        each.strip().lstrip("%")
        for names in _CALLED.findall(line)
        for each in names.split(",")
    ]


def _trips(computations: dict[str, list[str]], line: str, condition: str) -> int:
    known = _first(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known)
    waiting = [condition]
    while waiting:
        for inner in computations.get(waiting.pop(0), []):
            if match := re.search(r"= s32\[\][^ ]* constant\((\d+)\)", inner):
                return int(match[1])
            waiting += re.findall(r"calls=%([\w.\-]+)", inner)
    raise ValueError(f"no trip count in the condition {condition} of a loop")


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
