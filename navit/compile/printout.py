"""A compiled program's fit, time and communication, as a table and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax

from navit.compile import schedule
from navit.compile import topology as topologies
from navit.compile.kernel_times import Kernel, kernel_cycles, skipping
from navit.compile.program import Program
from navit.model import flops

_MIB = 2**20
# XLA's `ExecutionOptions.EFFORT_O0` (xla.proto).
_LEAST_EFFORT = 9
# The suffix of an instruction that the compiler copied.
_COPY = r"(\.(\d+|remat\d*|clone))+$"

PARTS = (
    "attention",
    "mlp",
    "embedding",
    "head",
    "vision, other",
    "text tower",
    "text embedding",
    "loss",
    "optimizer",
    "other",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler reports for a program, per device.

    Times are its schedule: no stalls, no waiting for memory or for other devices.

    Attributes:
      fits: whether the program fits; if not, `error` is the compiler's message.
      memory: the device's memory in MiB: the limit, the peak, and what it is used for.
        There are two batches: the next one is transferred while a step runs.
      milliseconds: time of a step, by part; None for a quick compile, or if the clock
        is unknown.
      unpriced: operations for which the compiler gives no cost. Their products are
        counted at the device's peak; without products they count as nothing.
      kernels: how often a step runs each Pallas kernel and library routine, by name.
      model_tflops: the model's operations on real tokens, for one device's share.
      mfu_bound: `model_tflops` divided by time and peak.
    """

    topology: str
    devices: int
    device_kind: str
    images: int
    tokens: int
    rows: int
    row_tokens: int
    fits: bool
    error: str
    compile_seconds: float
    quick: bool
    memory: dict[str, float]
    milliseconds: dict[str, float] | None
    step_milliseconds: float | None
    unpriced: int
    kernels: dict[str, int]
    model_tflops: float
    mfu_bound: float | None
    images_per_second: float | None
    tokens_per_second: float | None
    collectives: list[dict[str, Any]]


def compile_program(program: Program, topology: str, *, dump: Path | None) -> Report:
    """Compiles a program and reads the compiler's figures.

    Args:
      dump: the folder to which the compiler writes the kernels' schedules
        (`topology.prepare`); emptied here. None compiles at the least effort, which is
        fast but makes slow programs and gives no times.

    Raises:
      ValueError: if the compiler fails for another reason than memory.
    """
    gpu = topologies.is_gpu(topology)
    least = dump is None and not gpu
    options: dict[str, Any] | None = None
    if least:
        options = {"optimization_level": _LEAST_EFFORT}
    elif gpu:  # without one XLA cannot time Triton's products against cuBLAS's
        options = {"xla_gpu_enable_triton_gemm": False}
    start, error, compiled = time.perf_counter(), "", None
    try:
        compiled = program.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as failed:
        error = str(failed)
        if "RESOURCE_EXHAUSTED" not in error or "hbm" not in error.lower():
            raise ValueError(f"the compiler failed: {error[:1000]}") from failed
    seconds = time.perf_counter() - start
    limit, clock = topologies.chip(topology)
    peak = flops.peak(program.device_kind)
    total_flops = program.flops.total / program.devices
    memory = {
        "limit": limit * 1024,
        "parameters": program.parameters / _MIB,
        "optimizer": program.optimizer / _MIB,
        "batches": 2 * program.batch / _MIB,
    }
    parts, unpriced, collectives = None, 0, []
    kernels_run: collections.Counter[str] = collections.Counter()
    if compiled is not None:
        analysis = compiled.memory_analysis()
        needed = (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes
        )
        memory["activations"] = analysis.temp_size_in_bytes / _MIB
        memory["peak"] = (needed + program.batch) / _MIB
        operations = schedule.operations(compiled.as_text())
        for op in operations:
            kernels_run[re.sub(_COPY, "", op.kernel)] += op.runs if op.kernel else 0
        collectives = _collectives(operations)
        if dump is not None and clock is not None:
            kernels = kernel_cycles(dump)
            # The compiler writes one schedule for several equal kernels.
            alike = {
                _work(op): kernels[op.name] for op in operations if op.name in kernels
            }
            for op in operations:
                if op.kernel and _work(op) in alike:
                    kernels.setdefault(op.name, alike[_work(op)])
            unpriced = sum(
                not _is_priced(op, kernels, program.visited) for op in operations
            )
            parts = _parts(operations, kernels, clock, peak or 0.0, program.visited)
    if dump is not None:
        for file in dump.iterdir():
            file.unlink()
    step = sum(parts.values()) if parts else None
    on_each = 1e3 / step / program.devices if step else None
    return Report(
        topology=topology,
        devices=program.devices,
        device_kind=program.device_kind,
        images=program.counts.images,
        tokens=program.counts.tokens,
        rows=program.rows,
        row_tokens=program.row_tokens,
        fits=compiled is not None and memory["peak"] <= memory["limit"],
        error=error.split("\n")[0][:500],
        compile_seconds=round(seconds, 1),
        quick=dump is None,
        memory={name: round(value, 1) for name, value in memory.items()},
        milliseconds=parts and {k: round(v, 3) for k, v in parts.items()},
        step_milliseconds=step and round(step, 3),
        unpriced=unpriced,
        kernels=dict(+kernels_run),
        model_tflops=round(total_flops / 1e12, 4),
        mfu_bound=total_flops / (step / 1e3) / peak if step and peak else None,
        images_per_second=on_each and program.counts.images * on_each,
        tokens_per_second=on_each and program.counts.tokens * on_each,
        collectives=collectives,
    )


def part_of(scope: str) -> str:
    """Which of `PARTS` an operation belongs to, by the scopes around it."""
    words = set(re.split(r"[/():]", scope))
    if "optimizer" in words:
        return "optimizer"
    if "text" in words:
        return "text embedding" if "embedding" in words else "text tower"
    if "vision" in words:
        inner = [x for x in ("head", "embedding", "attention", "mlp") if x in words]
        return inner[0] if inner else "vision, other"
    return "loss" if "loss" in words else "other"


def table(report: Report) -> str:
    """Formats a report for a terminal."""
    lines = [
        f"{report.topology}: {report.devices} devices ({report.device_kind}), "
        f"{report.images:,} images and {report.tokens:,} tokens in {report.rows:,} "
        f"rows of {report.row_tokens}; compiled in {report.compile_seconds:.0f} s"
    ]
    memory = report.memory
    if not report.fits:
        lines.append(f"does NOT fit in {memory['limit'] / 1024:.2f} GiB")
        if report.error:
            lines.append(report.error)
        lines.append(
            "to save memory: train.microbatches=2 or more (the same step in parts), "
            "model.remat=attention or full, mesh.fsdp over more devices, fewer "
            "data.rows"
        )
        if "peak" not in memory:
            return "\n".join(lines) + "\n"
    else:
        margin = 1 - memory["peak"] / memory["limit"]
        lines.append(f"fits, with {margin:.0%} of the memory to spare")
    lines.append("memory of a device (MiB)")
    lines += [f"  {name:16}{value:>12,.0f}" for name, value in memory.items()]
    if report.milliseconds is None or report.step_milliseconds is None:
        why = "leave out --quick" if report.quick else "the chip's clock is not known"
        if topologies.is_gpu(report.topology):
            runs = ", ".join(f"{n} x {name}" for name, n in report.kernels.items())
            lines.append(f"kernels and library routines in a step: {runs or 'none'}")
            why = "the GPU's compiler writes no schedule"
        lines.append(f"no times: {why}")
    else:
        step = report.step_milliseconds
        lines.append("time of a step by the compiler's schedule (ms)")
        for name, value in report.milliseconds.items():
            if value:
                lines.append(f"  {name:16}{value:>12.2f}{value / step:>8.1%}")
        lines.append(f"  {'total':16}{step:>12.2f}")
        if report.unpriced:
            lines.append(
                f"  ({report.unpriced} operations without a cost: products count at "
                "the peak, kernels without a schedule as nothing, and kernels with "
                "unknown branches as if each step took all of them)"
            )
        lines.append(
            f"model {report.model_tflops:.3f} TFLOP a device, only on real tokens: "
            f"MFU at most {report.mfu_bound:.1%}; {report.images_per_second:,.0f} "
            f"images/s and {report.tokens_per_second:,.0f} tokens/s a device"
        )
        lines.append("a schedule without stalls or network: for ranking, not timing")
    return "\n".join([*lines, *_communication(report.collectives)]) + "\n"


def _communication(collectives: list[dict[str, Any]]) -> list[str]:
    """Lines for all communication, largest first; small ones are grouped by kind."""
    if not collectives:
        return ["no communication"]
    lines = ["communication, per device: MiB of the arrays, times runs"]
    small: collections.Counter[str] = collections.Counter()
    sums: collections.Counter[str] = collections.Counter()
    for each in collectives:
        mib = each["count"] * each["bytes"] / _MIB
        sums[each["kind"]] += mib
        if mib < 1:
            small[each["kind"]] += each["count"]
            continue
        shape = ",".join(str(x) for x in each["shape"])
        lines.append(
            f"  {each['kind']:20}{each['dtype'] + '[' + shape + ']':24}"
            f"{each['bytes'] / _MIB:>10.2f} x {each['count']:<4} = {mib:>10,.0f}  "
            f"{each['part']}"
        )
    for kind, count in small.items():
        lines.append(f"  {kind:20}less than 1 MiB each, {count} in all")
    lines += [f"  {kind:20}{'in all':24}{mib:>30,.0f}" for kind, mib in sums.items()]
    return lines


def to_json(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report)


def _work(op: schedule.Operation) -> tuple[Any, ...]:
    """A key that is equal for a kernel and its recomputation."""
    name = re.sub(_COPY, "", op.kernel)
    return name, op.products, op.taken, part_of(op.scope)


def _skips(op: schedule.Operation, visited: tuple[int, float] | None) -> bool:
    """Whether an operation is a kernel that loops over blocks of keys."""
    of_images = op.kernel.startswith("splash") and part_of(op.scope) == "attention"
    return of_images and visited is not None


def _taken(
    op: schedule.Operation, kernel: Kernel, visited: tuple[int, float] | None
) -> tuple[float, ...] | None:
    """The share of steps that run each of a kernel's branches; None if unknown."""
    if _skips(op, visited) and visited is not None:
        return skipping(kernel, *visited)
    return op.taken if len(op.taken) == len(kernel.branches) else None


def _is_priced(
    op: schedule.Operation,
    kernels: dict[str, Kernel],
    visited: tuple[int, float] | None,
) -> bool:
    if not op.kernel:
        return bool(op.cycles) or not op.products
    if op.name not in kernels:
        return False
    has_shares = bool(op.taken) or _skips(op, visited)
    return not has_shares or _taken(op, kernels[op.name], visited) is not None


def _parts(
    operations: list[schedule.Operation],
    kernels: dict[str, Kernel],
    clock: float,
    peak: float,
    visited: tuple[int, float] | None = None,
) -> dict[str, float]:
    """Milliseconds by part."""
    out = dict.fromkeys(PARTS, 0.0)
    for op in operations:
        seconds = op.cycles / clock
        if op.kernel and op.name in kernels:
            kernel = kernels[op.name]
            taken = _taken(op, kernel, visited)
            seconds = kernel.cycles(kernel.steps or 0, taken=taken) / clock
            if peak:  # unlike the schedule, the chip waits for its matrix units
                seconds = max(seconds, op.products / peak)
        elif not op.cycles and peak:
            seconds = op.products / peak
        out[part_of(op.scope)] += 1e3 * seconds * op.runs
    return out


def _collectives(operations: list[schedule.Operation]) -> list[dict[str, Any]]:
    """Groups equal collectives; those that send the most come first."""
    counts: collections.Counter[tuple] = collections.Counter()
    for op in operations:
        for x in op.collectives:
            counts[(x.kind, x.dtype, x.shape, x.bytes, part_of(x.scope))] += x.runs
    grouped = [
        dict(kind=kind, dtype=dtype, shape=list(shape), bytes=size, part=part, count=n)
        for (kind, dtype, shape, size, part), n in counts.items()
    ]
    return sorted(grouped, key=lambda x: -x["bytes"] * x["count"])
