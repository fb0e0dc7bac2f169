"""Times packed attention: every implementation, forward and with gradients.

  python -m navit.bench.attention_speed
  python -m navit.bench.attention_speed --mixes 2x4096x16,4x1024xnaflex
  python -m navit.bench.attention_speed --mixes 1x4096x1 --windows 8
  python -m navit.bench.attention_speed --topology v6e:1x1
  python -m navit.bench.attention_speed --width 64,72      # on a GPU

On this machine, each line is one mix: rows x tokens in a row x images in a row, all
images being as long as fits, or images of drawn lengths: of sides that are uniform in
64 to 384 pixels ("navit"), of SigLIP 2's budgets ("naflex"), or of up to 729 tokens
("native"). Times are medians of interleaved rounds, and "unpack" has the bounds that a
plan would give it. With --windows, images are nearly square, and attention is within
squares of that many patches, as in most blocks of Qwen2.5-VL.

On a GPU, arrays are bfloat16 (float32 before Ampere), rows have 1024 to 8192 tokens,
and "flash" is timed too, with two that navit does not use: "cudnn", cuDNN's packed
sequences (Hopper and later), and "mha", the kernel that is a part of jax. An
implementation that does not run is named with the reason. Nothing of this has been run
on a GPU.

With a TPU topology, nothing runs and no TPU is needed. The TPU compiler compiles
forward and backward passes of 16,384 tokens, in images of 64 to 1024 tokens packed into
rows. Times are those of its schedule: the kernels' bundles, and the cycles that it
estimates for all other operations, without stalls and without the network.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from navit.bench.provenance import provenance
from navit.compile import kernel_times, schedule, topology
from navit.compile.program import visited_blocks
from navit.config import MeshConfig
from navit.kernels import splash
from navit.model.attention import attention, attention_qkvpacked
from navit.model.layers import compute_dtype
from navit.model.windows import window_ids
from navit.plan.rows import pack_rows
from navit.sharding import make_mesh

IMPLEMENTATIONS = ("xla", "unpack", "blocks")
# By platform; other accelerators take those of a CPU.
MIXES = {
    "cpu": "8x256x1,2x1024x1,2x1024x4,2x1024x16,1x4096x4,1x4096x16,"
    "4x576xnavit,4x1024xnavit,1x4096xnavit,4x1024xnaflex,1x4096xnaflex,"
    "4x1024xnative,1x4096xnative",
    "gpu": "16x1024xnaflex,4x4096xnaflex,2x8192xnaflex,"
    "16x1024xnative,4x4096xnative,2x8192xnative",
}
# Token counts of patches of 16 pixels, and the most that there can be.
LENGTHS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], int]] = {
    "navit": (lambda rng, n: (rng.uniform(64, 384, n) / 16) ** 2, 576),
    "naflex": (
        lambda rng, n: (
            rng.choice([128, 256, 576, 784, 1024], n) * rng.uniform(0.93, 1, n)
        ),
        1024,
    ),
    "native": (lambda rng, n: np.minimum(rng.uniform(200, 900, n), 729), 729),
}
ROWS = {
    "xla": (1024,),
    "splash": (256, 512, 1024, 1152),
    "splash_skip": (2048, 4096, 8192),
}
TOKENS = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--mixes",
        help="rows x row tokens x images in a row (or navit, naflex, native), "
        "comma-separated",
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument(
        "--width", default="64", help="channels of a head, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--windows", type=int, metavar="SIDE", help="attend within windows of patches"
    )
    parser.add_argument("--topology", help="one chip: v6e:1x1, v5e:1x1, v5p:1x1x1")
    parser.add_argument(
        "--only",
        help="with --topology: implementation:row tokens, comma-separated",
    )
    # The folder of the child process that compiles one line's case.
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    widths = [int(width) for width in args.width.split(",")]
    if args.dump:
        _compiled(args.topology, args.only, args.heads, widths[0], args.dump)
        return
    if args.topology:
        for width in widths:
            _scheduled(args.topology, args.only, args.heads, width)
        return
    gpu = jax.default_backend() == "gpu"
    names = list(IMPLEMENTATIONS)
    if gpu:
        names += ["flash", *CANDIDATES]
    mixes = (args.mixes or MIXES["gpu" if gpu else "cpu"]).split(",")
    try:
        parsed = [_mix(text) for text in mixes]
    except ValueError as error:
        parser.error(str(error))
    print(provenance())
    for width in widths:
        print(f"{args.heads} heads of {width}; milliseconds, times as fast as xla")
        print(f"{'rows x tokens x images':>24}{'':10}", *map("{:>15}".format, names))
        for mix in parsed:
            _line(names, *mix, args.heads, width, args.rounds, args.windows)


def _mix(text: str) -> tuple[int, int, str]:
    """Rows, tokens in a row, and images in a row or the name of drawn lengths."""
    match = re.fullmatch(rf"(\d+)x(\d+)x(\d+|{'|'.join(LENGTHS)})", text)
    if not match:
        raise ValueError(
            f"--mixes {text!r} is not rows x tokens x images, such as 2x1024x4 or "
            f"4x1024xnaflex ({', '.join(LENGTHS)})"
        )
    rows, tokens, images = int(match[1]), int(match[2]), match[3]
    longest = LENGTHS[images][1] if images in LENGTHS else int(images)
    if tokens < longest:
        raise ValueError(f"--mixes {text!r}: take rows of at least {longest} tokens")
    return rows, tokens, images


def _line(
    names: list[str],
    rows: int,
    tokens: int,
    images: str,
    heads: int,
    width: int,
    rounds: int,
    window: int | None,
) -> None:
    rng = np.random.default_rng(0)
    dtype = compute_dtype("auto")
    q, k, v = jnp.asarray(
        rng.standard_normal((3, rows, tokens, heads, width), np.float32), dtype
    )
    if images in LENGTHS:
        draw, longest = LENGTHS[images]
        lengths = draw(rng, 2 * rows * tokens // 100).astype(np.int64)
    else:
        longest = tokens // int(images)
        lengths = np.full(rows * int(images), longest)
    packed = pack_rows(np.stack([np.ones_like(lengths), lengths], -1), tokens, None)
    each = [packed.slice(row, row + 1).lengths for row in range(rows)]
    ids = np.zeros((rows, tokens), np.int32)
    for row, own in zip(ids, each, strict=True):
        row[: own.sum()] = np.repeat(np.arange(1, len(own) + 1), own)
    segment_ids = jnp.asarray(ids)
    if window is not None:
        segment_ids = _windows(ids, each, window)
        longest = min(longest, window**2)
    calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "gradients": {}}
    for name in names:
        attend = functools.partial(
            attention,
            segment_ids=segment_ids,
            implementation=name,
            max_segments=int(segment_ids.max()),
            max_segment_tokens=longest,
        )
        if name in CANDIDATES:
            attend = functools.partial(CANDIDATES[name], ids=ids)
        forward = jax.jit(attend)
        total = jax.jit(
            jax.grad(
                lambda *x, attend=attend: (attend(*x).astype(jnp.float32) ** 2).sum(),
                (0, 1, 2),
            )
        )
        try:
            for what, call in (("forward", forward), ("gradients", total)):
                jax.block_until_ready(call(q, k, v))
                calls[what][name] = functools.partial(call, q, k, v)
        # Whatever a library or its kernel raises; the dense mask may need more memory
        # than a GPU has.
        except Exception as error:
            if name in IMPLEMENTATIONS and jax.default_backend() != "gpu":
                raise
            print(f"{name} is left out: {str(error).splitlines()[0][:160]}")
            calls["forward"].pop(name, None)
    for what, sides in calls.items():
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                jax.block_until_ready(side())
                times[name].append(1000 * (time.perf_counter() - start))
        medians = {name: statistics.median(x) for name, x in times.items()}
        cells = [
            f"{medians[x]:9.2f} {medians.get('xla', np.nan) / medians[x]:5.2f}"
            if x in medians
            else f"{'-':>15}"
            for x in names
        ]
        print(f"{f'{rows} x {tokens} x {images}':>24} {what:9}", *cells, flush=True)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, ids: np.ndarray) -> jax.Array:
    """cuDNN's attention over packed sequences, which jax has no public name for.

    Segments must be contiguous from the start of a row. Padding is not written.
    """
    from jax._src.cudnn.fused_attention_stablehlo import (
        MaskType,
        dot_product_attention,
    )

    slots = np.arange(1, ids.max() + 1)
    lengths = (ids[..., None] == slots).sum(1)
    ends = np.cumsum(lengths, -1)
    offsets = np.concatenate([np.zeros_like(ends[:, :1]), ends], -1)
    used = lengths > 0
    lengths = np.where(used, lengths, -1).astype(np.int32)
    first = np.ones_like(used[:, :1])
    offsets = np.where(np.concatenate([first, used], -1), offsets, -1).astype(np.int32)
    out = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=jnp.asarray(lengths),
        kv_seqlen=jnp.asarray(lengths),
        q_offsets=jnp.asarray(offsets),
        kv_offsets=jnp.asarray(offsets),
        mask_type=MaskType.PADDING,
        scale=q.shape[-1] ** -0.5,
    )
    return jnp.where(jnp.asarray(ids > 0)[..., None, None], out, 0)


def _mha(q: jax.Array, k: jax.Array, v: jax.Array, *, ids: np.ndarray) -> jax.Array:
    """jax's own kernel through Triton, which masks all pairs of a row."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    out: jax.Array = mha(q, k, v, jnp.asarray(ids), sm_scale=q.shape[-1] ** -0.5)
    return out


CANDIDATES = {"cudnn": _cudnn, "mha": _mha}


def _windows(ids: np.ndarray, lengths: list[np.ndarray], window: int) -> jax.Array:
    """The window of each token, if images are as wide as they are high or wider.

    Args:
      ids: the image of each token, `[b, n]`.
      lengths: of each row's images; the last row of an image may be short.
    """
    coords = np.zeros((*ids.shape, 2), np.int32)
    grids = np.zeros((len(ids), ids.max(), 2), np.int32)
    for row, own in enumerate(lengths):
        columns = np.ceil(np.sqrt(own)).astype(np.int32)
        place = np.concatenate([np.arange(length) for length in own])
        across = np.repeat(columns, own)
        tokens = np.s_[row, : len(place)]
        coords[tokens] = np.stack([place // across, place % across], -1)
        grids[row, : len(own)] = np.stack([-(-own // columns), columns], -1)
    return window_ids(jnp.asarray(ids), jnp.asarray(coords), jnp.asarray(grids), window)


def _scheduled(name: str, only: str | None, heads: int, width: int) -> None:
    """Runs one process per line: libtpu reads its dump folder only once."""
    known = [kind for kind, chip in topology.CHIPS.items() if chip.clock]
    if name.partition(":")[0] not in known:
        raise SystemExit(f"--topology {name}: the clock is known only for {known}")
    cases = only.split(",") if only else [f"{i}:{n}" for i in ROWS for n in ROWS[i]]
    print(
        f"{heads} heads of {width}, {TOKENS} tokens, {name}; milliseconds by schedule"
    )
    titles = ("forward", "backward", "other", "sum", "MiB", "blocks", "compile s")
    print(f"{'':18}", *map("{:>9}".format, titles), flush=True)
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="navit-schedule-") as dump:
            command = [sys.executable, "-m", "navit.bench.attention_speed"]
            command += ["--topology", name, "--only", case]
            command += ["--heads", str(heads), "--width", str(width), "--dump", dump]
            subprocess.run(command, check=True)


def _compiled(name: str, case: str, heads: int, width: int, dump: Path) -> None:
    topology.prepare(str(dump))
    implementation, _, row = case.partition(":")
    n, clock = int(row), (topology.chip(name).clock or 0.0) / 1000
    mesh, rules = make_mesh(MeshConfig(), topology.devices(name))
    assert mesh is not None
    start = time.perf_counter()
    place = jax.NamedSharding(mesh, rules("batch") or jax.P())
    # In the layout that a projection writes.
    b, make = TOKENS // n, functools.partial(jax.ShapeDtypeStruct, sharding=place)
    qkv = make((b, n, 3 * heads * width), jnp.bfloat16)
    x, ids = make((b, n, heads * width), jnp.bfloat16), make((b, n), jnp.int32)

    def both(qkv: jax.Array, ids: jax.Array, gradient: jax.Array) -> object:
        def attend(qkv: jax.Array) -> jax.Array:
            return attention_qkvpacked(
                qkv, ids, width=width, implementation=implementation
            )

        out, back = jax.vjp(attend, qkv)
        return out, back(gradient)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(qkv, ids, x)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    operations = schedule.operations(compiled.as_text() or "")
    other = sum(x.cycles * x.runs for x in operations) / clock
    visits = _mean_visits(n) if implementation == "splash_skip" else None
    times = {"forward": 0.0, "backward": 0.0}
    for kernel_name, kernel in kernel_times.kernel_cycles(dump).items():
        part = "backward" if "backward" in kernel_name else "forward"
        taken = None
        if visits is not None:
            taken = kernel_times.skipping(kernel, _blocks(n), visits)
        times[part] += kernel.cycles(taken=taken) / clock
    figures = [*times.values(), other, sum(times.values()) + other]
    analysis = compiled.memory_analysis()
    assert analysis is not None
    memory = analysis.temp_size_in_bytes / 2**20
    blocks = "all" if visits is None else f"{visits / _blocks(n):.2f}"
    print(
        f"{implementation:12} {n:5}",
        *map("{:9.3f}".format, figures),
        f"{memory:9.0f} {blocks:>9} {seconds:9.0f}",
        flush=True,
    )


def _blocks(row_tokens: int) -> int:
    return row_tokens // splash.block_size(row_tokens)


def _mean_visits(row_tokens: int) -> float:
    """The mean number of key blocks that a block of queries visits."""
    lengths = np.random.default_rng(0).integers(64, 1025, 100 * row_tokens // 544)
    grids = np.stack([np.ones_like(lengths), lengths], -1)
    rows = pack_rows(grids, row_tokens, None)
    return visited_blocks(rows, row_tokens)


if __name__ == "__main__":
    main()
