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
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from navit.config import Config
from navit.files import write_atomic
from navit.input import memory, pixels
from navit.model.two_tower import TwoTower
from navit.plan.geometry import grid_for
from navit.sharding import Rules, make_mesh
from navit.sources.images import size_of
from navit.train.checkpoint import Checkpoints
from navit.train.comparison import Verdict
from navit.train.kernel_check import verdicts

_PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
# Photographs of a source checkout; an installed navit has none.
_SAMPLE = Path(__file__).parents[1] / "data/sample"
# Seconds that the measurement of decoding takes.
_DECODING = 1.0


def run(config: Config, workdir: Path | None, out: Path | None) -> int:
    """Prints what this machine is and does; returns 1 if a kernel or checkpoint fails.

    Args:
      workdir: where the checkpoint goes, in a folder that is removed again; None for
        the system's temporary folder.
      out: also write everything to this JSON file.
    """
    mesh, rules = make_mesh(config.mesh)
    versions = _versions()
    print(*(f"{name} {version}" for name, version in versions.items()), sep=", ")
    devices = _devices()
    for line, count in devices.items():
        print(f"{count} x {line}")
    free = memory.free_memory()
    print(f"{os.cpu_count()} CPU cores, {free / 2**30:.1f} GiB of memory free")
    decoding = _decoding(config)
    print(
        f"one core decodes {decoding['images_per_second']:.0f} images/s, "
        f"{decoding['megapixels_per_second']:.0f} megapixels/s ({decoding['images']})"
    )
    checkpoint = _checkpoint(config, workdir)
    print(
        f"a checkpoint of {checkpoint['mib']:.1f} MiB in {checkpoint['folder']}: "
        f"written in {checkpoint['write_seconds']:.2f} s, read in "
        f"{checkpoint['read_seconds']:.2f} s, "
        f"{'bit-equal' if checkpoint['equal'] else 'NOT EQUAL'}; "
        f"{checkpoint['disk_free_gib']:.1f} GiB of disk free",
        flush=True,
    )
    found = _kernels(config, mesh, rules)
    good = checkpoint["equal"] and not any(x.failed for x in found)
    if out:
        results = {
            "versions": versions,
            "devices": devices,
            "memory_free_gib": free / 2**30,
            "decoding": decoding,
            "checkpoint": checkpoint,
            "kernels": [dataclasses.asdict(x) for x in found],
            "ok": good,
        }
        write_atomic(out, (json.dumps(results, indent=2) + "\n").encode())
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


def _decoding(config: Config) -> dict[str, Any]:
    """How fast one thread decodes images and resizes them to the largest budget."""
    vision = config.model.vision
    files = sorted(_SAMPLE.glob("*.jpg"))
    contents, images = [x.read_bytes() for x in files], "photographs of data/sample"
    if not contents:
        contents, images = [_photograph(seed) for seed in range(4)], "generated JPEGs"
    budget = config.data.most_tokens(vision.patch_size)
    work = []
    for content in contents:
        height, width = size_of(content)
        rows, columns = grid_for(
            height, width, patch_size=vision.patch_size, max_tokens=budget
        )
        sides = rows * vision.patch_size, columns * vision.patch_size
        work.append((content, sides, height * width))
    count, total = 0, 0
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < _DECODING:
        content, (height, width), area = work[count % len(work)]
        pixels.load(content, height, width, dct=config.data.dct)
        count, total = count + 1, total + area
    return {
        "images": images,
        "images_per_second": count / seconds,
        "megapixels_per_second": total / 1e6 / seconds,
    }


def _photograph(seed: int) -> bytes:
    """A JPEG file of 640x480 pixels with detail of all sizes."""
    rng, image = np.random.default_rng(seed), Image.new("RGB", (640, 480))
    for side in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image = Image.blend(image, noise.resize(image.size), 0.5)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _checkpoint(config: Config, workdir: Path | None) -> dict[str, Any]:
    """Writes and reads the image tower of the config, with one layer."""
    vision = dataclasses.replace(config.model.vision, depth=1)
    model = dataclasses.replace(config.model, vision=vision, text=None)
    tower = TwoTower(model, rngs=nnx.Rngs(0))
    if workdir:
        workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="navit-check-", dir=workdir) as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        start = time.perf_counter()
        checkpoints.save_model(tower, config)
        checkpoints.close()
        written = time.perf_counter()
        again = Checkpoints(Path(folder))
        restored, _ = again.restore_model(jax.eval_shape(lambda: tower))
        again.close()
        read = time.perf_counter()
        size = sum(x.stat().st_size for x in Path(folder).rglob("*") if x.is_file())
        disk = shutil.disk_usage(folder).free
        pairs = zip(jax.tree.leaves(tower), jax.tree.leaves(restored), strict=True)
        equal = all(
            np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
        )
    return {
        "folder": str(workdir or tempfile.gettempdir()),
        "mib": size / 2**20,
        "write_seconds": written - start,
        "read_seconds": read - written,
        "equal": equal,
        "disk_free_gib": disk / 2**30,
    }


def _kernels(
    config: Config, mesh: jax.sharding.Mesh | None, rules: Rules
) -> list[Verdict]:
    """Prints one line for each implementation, as soon as it is checked."""
    print("\nkernels against the plain path, one call with gradients")
    titles = ("values", "gradients", "at most", "ms", "plain ms")
    print(f"{'':28}", *map("{:>11}".format, titles), "verdict")
    found = []
    for verdict in verdicts(config, mesh, rules):
        found.append(verdict)
        print(_line(verdict), flush=True)
    if any(x.interpreted for x in found):
        print("interpreted: Pallas simulates a TPU here, so no times are compared")
    return found


def _line(x: Verdict) -> str:
    differences = (x.values, x.gradients, x.tolerance)
    cells = ["" if v is None else f"{v:.1e}" for v in differences]
    times = [
        "" if t is None else f"{1000 * t:.2f}" for t in (x.seconds, x.plain_seconds)
    ]
    cells += ["interpreted", times[1]] if x.interpreted else times
    verdict = f"{x.verdict}: {x.why}" if x.why else x.verdict
    return " ".join([f"{x.name:28}", *map("{:>11}".format, cells), verdict])
