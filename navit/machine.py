"""`navit check`: whether this machine runs a config, in one look."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from navit.config import Config
from navit.files import write_atomic
from navit.input import memory, pixels
from navit.model.two_tower import TwoTower
from navit.plan.geometry import grid_for
from navit.sharding import Rules, make_mesh, use_mesh
from navit.sources.images import size_of
from navit.sources.synthetic import SyntheticSource
from navit.train.checkpoint import Checkpoints
from navit.train.checks import check_config, check_devices
from navit.train.comparison import Verdict
from navit.train.kernel_check import kernel_verdicts

_PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
# Photographs of a source checkout; an installed navit has none.
_SAMPLE = Path(__file__).parents[1] / "data/sample"
# Seconds that the measurement of decoding takes.
_DECODING = 1.0


@dataclasses.dataclass(frozen=True)
class _Decoding:
    images: str
    images_per_second: float
    megapixels_per_second: float


@dataclasses.dataclass(frozen=True)
class _RoundTrip:
    """How a checkpoint was written and read; `equal`: to the bit."""

    folder: str
    mib: float
    write_seconds: float
    read_seconds: float
    equal: bool
    disk_free_gib: float


def run(config: Config, workdir: Path | None, out: Path | None) -> int:
    """Prints the state of this machine; returns 1 if a kernel or checkpoint fails.

    Args:
      workdir: where the checkpoint goes, in a folder that is removed again; None for
        the system's temporary folder.
      out: also write everything to this JSON file.

    Raises:
      ValueError: if training refuses the config, or on these devices.
    """
    check_config(config)
    mesh, rules = make_mesh(config.mesh)
    with use_mesh(mesh):
        check_devices(config, rules)
    versions = _versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    devices = _devices()
    for line, count in devices.items():
        print(f"{count} x {line}")
    free = memory.free_memory() / 2**30
    print(f"{os.cpu_count()} CPU cores, {free:.1f} GiB of memory free")
    decoding = _decoding(config)
    print(
        f"one core decodes {decoding.images_per_second:.0f} images/s, "
        f"{decoding.megapixels_per_second:.0f} megapixels/s ({decoding.images})"
    )
    checkpoint = _round_trip(config, workdir)
    print(
        f"a checkpoint of {checkpoint.mib:.1f} MiB in {checkpoint.folder}: written in "
        f"{checkpoint.write_seconds:.2f} s, read in {checkpoint.read_seconds:.2f} s, "
        f"{'bit-equal' if checkpoint.equal else 'NOT EQUAL'}; "
        f"{checkpoint.disk_free_gib:.1f} GiB of disk free",
        flush=True,
    )
    verdicts = _kernels(config, mesh, rules)
    good = checkpoint.equal and not any(x.failed for x in verdicts)
    if out:
        results = {
            "versions": versions,
            "devices": devices,
            "memory_free_gib": free,
            "decoding": dataclasses.asdict(decoding),
            "checkpoint": dataclasses.asdict(checkpoint),
            "kernels": [dataclasses.asdict(x) for x in verdicts],
            "ok": good,
        }
        text = json.dumps(results, indent=2, allow_nan=False)
        write_atomic(out, f"{text}\n".encode())
    return 0 if good else 1


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> dict[str, int]:
    """The number of devices of each kind, with their memory if they report it."""
    counts: dict[str, int] = {}
    for device in jax.devices():
        kind = device.device_kind
        name = (
            device.platform if kind == device.platform else f"{device.platform} {kind}"
        )
        if device.process_index == jax.process_index() and (
            stats := device.memory_stats()
        ):
            used, limit = (stats.get(x, 0) for x in ("bytes_in_use", "bytes_limit"))
            name += f", {(limit - used) / 2**30:.1f} of {limit / 2**30:.1f} GiB free"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _decoding(config: Config) -> _Decoding:
    """How fast one thread decodes images and resizes them to the largest budget."""
    p = config.model.vision.patch_size
    budget = config.data.most_tokens(p)
    images = "photographs of data/sample"
    contents = [x.read_bytes() for x in sorted(_SAMPLE.glob("*.jpg"))]
    if not contents:
        images, file = "a drawn image", io.BytesIO()
        drawn = np.asarray(SyntheticSource(1).record(0).image)
        Image.fromarray(drawn).save(file, "JPEG")
        contents = [file.getvalue()]
    work = []
    for content in contents:
        height, width = size_of(content)
        rows, columns = grid_for(height, width, patch_size=p, max_tokens=budget)
        work.append((content, rows * p, columns * p, height * width))
    count, total = 0, 0
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < _DECODING:
        content, height, width, area = work[count % len(work)]
        pixels.load(content, height, width, dct=config.data.dct)
        count, total = count + 1, total + area
    return _Decoding(images, count / seconds, total / 1e6 / seconds)


def _round_trip(config: Config, workdir: Path | None) -> _RoundTrip:
    """Writes and reads the image tower of the config, with one layer."""
    vision = dataclasses.replace(config.model.vision, depth=1)
    model = dataclasses.replace(config.model, vision=vision, text=None)
    tower = TwoTower(model, rngs=nnx.Rngs(0))
    parent = workdir or Path(tempfile.gettempdir())
    made = [x for x in (parent, *parent.parents) if not x.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="navit-check-", dir=parent) as folder:
            checkpoints = Checkpoints(Path(folder), keep=1)
            start = time.perf_counter()
            checkpoints.save_model(tower, config)
            checkpoints.close()
            written = time.perf_counter()
            again = Checkpoints(Path(folder))
            restored, _ = again.restore_model(jax.eval_shape(lambda: tower))
            again.close()
            read = time.perf_counter()
            files = [x for x in Path(folder).rglob("*") if x.is_file()]
            size, disk = sum(x.stat().st_size for x in files), shutil.disk_usage(folder)
    finally:
        for path in made:
            path.rmdir()
    pairs = zip(jax.tree.leaves(tower), jax.tree.leaves(restored), strict=True)
    return _RoundTrip(
        folder=f"{parent}",
        mib=size / 2**20,
        write_seconds=written - start,
        read_seconds=read - written,
        equal=all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs),
        disk_free_gib=disk.free / 2**30,
    )


def _kernels(
    config: Config, mesh: jax.sharding.Mesh | None, rules: Rules
) -> list[Verdict]:
    """Prints one line for each implementation, as soon as it is checked."""
    print("\nkernels against the plain path, one call with gradients")
    titles = ("values", "gradients", "at most", "ms", "plain ms")
    print(f"{'':28}", *map("{:>11}".format, titles), "verdict")
    verdicts = []
    for verdict in kernel_verdicts(config, mesh, rules):
        verdicts.append(verdict)
        print(_line(verdict), flush=True)
    if any(x.interpreted for x in verdicts):
        print("interpreted: Pallas simulates a TPU or GPU here: no times are compared")
    return verdicts


def _line(x: Verdict) -> str:
    differences = (x.values, x.gradients, x.tolerance)
    cells = ["" if v is None else f"{v:.1e}" for v in differences]
    times = (x.seconds, x.plain_seconds)
    cells += ["" if t is None else f"{1000 * t:.2f}" for t in times]
    if x.interpreted:
        cells[3] = "interpreted"
    verdict = f"{x.outcome}: {x.why}" if x.why else x.outcome
    return " ".join([f"{x.name:28}", *map("{:>11}".format, cells), verdict])
