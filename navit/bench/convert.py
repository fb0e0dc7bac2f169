"""Measures time and peak memory of converting and loading a model of a named size.

  python -m navit.bench.convert g        # SigLIP 2's largest: 1.9 B parameters, 7.5 GB

Random weights are written as a Hugging Face directory, converted to an npz and back,
and loaded. Each step runs in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from navit.config import ModelConfig
from navit.convert import huggingface
from navit.convert.stored import Weights, shapes_of
from navit.model import variants


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("size", help="Ti, S, B, L, So400m or g")
    parser.add_argument("--folder", type=Path, help="where to write (default: /tmp)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        _step(args.step, args.size, args.path)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in ("write", "to npz", "back", "load"):
            command = [sys.executable, "-m", "navit.bench.convert", args.size]
            subprocess.run([*command, "--step", step, "--path", folder], check=True)
        _compare(Path(folder))


def _step(step: str, size: str, folder: Path) -> None:
    from navit import weights

    first, npz = folder / "huggingface", folder / "big_vision.npz"
    start = time.perf_counter()
    if step == "write":
        huggingface.write(_random(size), first)
    elif step == "to npz":
        weights.write(weights.read(first), npz, "big_vision")
    elif step == "back":
        weights.write(weights.read(npz), folder / "back", "huggingface")
    else:
        weights.load(first)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stored = sum(x.stat().st_size for x in first.glob("*.safetensors")) / 2**30
    print(
        f"{size} {step:7} {seconds:7.1f} s  peak {peak:5.2f} GiB  "
        f"(weights {stored:.2f} GiB)",
        flush=True,
    )


def _random(size: str) -> Weights:
    """Random weights with the public text vocabulary; g's text tower is So400m's."""
    text = "So400m" if size == "g" else size
    model = ModelConfig(
        vision=variants.vision(f"{size}/16"),
        text=variants.text(text, vocab_size=256_000, length=64, tokenizer=None),
    )
    shapes = shapes_of(model)
    rng = np.random.default_rng(0)
    return Weights(
        model,
        lambda name: rng.standard_normal(shapes[name], np.float32),
        where="random weights",
    )


def _compare(folder: Path) -> None:
    for file in sorted((folder / "huggingface").glob("*.safetensors")):
        other = folder / "back" / file.name
        same = file.stat().st_size == other.stat().st_size
        with file.open("rb") as a, other.open("rb") as b:
            while same and (block := a.read(2**24)):
                same = block == b.read(2**24)
        print(f"{file.name}: {'same bytes' if same else 'DIFFERS'}")


if __name__ == "__main__":
    main()
