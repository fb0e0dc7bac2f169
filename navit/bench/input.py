"""Measures the input pipeline, stage by stage: `navit bench input CONFIG`.

Times are CPU seconds of this process, so that other work on the machine does not count.
"pixels" is the necessary work: to decode, resize and patchify the same images at the
same grids, from bytes in memory. The whole pipeline should be nearly as fast.

  navit bench input configs/photos.py data.train.path=~/photos
  python -m navit.bench.input                 # against transformers, if installed
  python -m navit.bench.input --memory 2000   # a worker's memory over 2000 batches
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import grain
import numpy as np
from PIL import Image

from navit.config import Config, DataConfig, Folder, TrainConfig
from navit.input import pipeline, pixels
from navit.input.make_batch import MakeBatch
from navit.plan import geometry
from navit.plan.batches import BatchPlans
from navit.plan.epoch import plan_block
from navit.sources.images import ImageLike, standard
from navit.sources.kinds import Opener
from navit.sources.local_cache import open_cache
from navit.sources.source import Source

SAMPLE = Path(__file__).parents[2] / "data/sample"


def run(config: Config, batches: int, rounds: int = 3) -> None:
    """Prints the cost of each stage and the rate of the whole pipeline.

    Raises:
      ValueError: if `batches` is less than 1.
    """
    if batches < 1:
        raise ValueError(f"--batches {batches} measures nothing: give 1 or more")
    source = Opener(cache=open_cache(config.data)).open(config.data.train)
    data, patch_size = config.data, config.model.vision.patch_size
    parts = pipeline.parts_of(source, data)
    with _timed() as seconds:
        block = plan_block(
            source.sizes, data, patch_size=patch_size, epoch=0, parts=parts
        )
    _line("plan", len(block.index), seconds[0])
    plans = BatchPlans(
        source.sizes, data, patch_size=patch_size, steps=batches, parts=parts
    )
    rows = [plans[i] for i in range(batches)]
    index = np.concatenate([x.index for x in rows]).tolist()
    with _timed() as seconds:
        images = {i: standard(source.record(i).image) for i in index}
    _line("read", len(index), seconds[0])

    make_batch = MakeBatch(
        source,
        data,
        patch_size=patch_size,
        slots=plans.slots,
        captions=plans.captions,
        text_tower=config.model.text,
        named=set(),
    )
    dataset = grain.MapDataset.source(plans).map(make_batch)
    grids = np.concatenate([x.grids for x in rows])
    boxes: list = [None] * len(index)
    if data.crop is not None:
        boxes = [
            tuple(b) for x in rows if x.boxes is not None for b in x.boxes.tolist()
        ]
    times: dict[str, list[float]] = {"pixels": [], "pipeline": []}
    for _ in range(rounds):  # interleaved
        with _timed() as seconds:
            _pixels(images, index, grids, boxes, patch_size, data.dct)
        times["pixels"].append(seconds[0])
        with _timed() as seconds:
            for batch in dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)):
                del batch
        times["pipeline"].append(seconds[0])
    medians = {name: statistics.median(x) for name, x in times.items()}
    for name, median in medians.items():
        _line(name, len(index), median)
    print(f"pipeline / pixels: {medians['pixels'] / medians['pipeline']:.1%}")
    _wall(config, source, batches)


def _pixels(
    images: Mapping[int, ImageLike],
    index: list[int],
    grids: np.ndarray,
    boxes: list,
    patch_size: int,
    dct: str,
) -> None:
    out = np.zeros((int(grids.prod(-1).max()), patch_size**2 * 3), np.uint8)
    for i, grid, box in zip(index, grids, boxes, strict=True):
        height, width = (grid * patch_size).tolist()
        try:
            array = pixels.load(images[i], height, width, dct=dct, box=box)
        except ValueError:  # unreadable: the pipeline leaves its slot empty
            continue
        pixels.to_patches(array, patch_size, out[: int(grid.prod())])


def _wall(config: Config, source: Source, batches: int) -> None:
    """Prints images per second of wall time, with the config's workers."""
    train = dataclasses.replace(config.train, steps=batches + 3)
    config = dataclasses.replace(config, train=train)
    with contextlib.closing(pipeline.train_batches(config, source)) as iterator:
        for _ in range(3):  # until the workers have started
            next(iterator)
        start = time.perf_counter()
        count = sum(int((next(iterator).id >= 0).sum()) for _ in range(batches))
        seconds = time.perf_counter() - start
    workers = config.data.workers
    kind = f"{workers} workers" if workers else "threads of one process"
    print(f"as trained  {count / seconds:10.1f} images/s of wall time, {kind}")


@contextlib.contextmanager
def _timed():  # type: ignore[no-untyped-def]
    """Measures CPU seconds of all threads of this process, in a list of one."""
    seconds = [time.process_time()]
    yield seconds
    seconds[0] = time.process_time() - seconds[0]


def _line(name: str, count: int, seconds: float) -> None:
    print(
        f"{name:10}  {count / seconds:10.1f} images/s of CPU time  "
        f"{1000 * seconds / count:8.3f} ms an image",
        flush=True,
    )


def peers(rounds: int) -> None:
    """Compares decode, resize and patchify with transformers' processor, on one core.

    Prints milliseconds per image.
    """
    try:
        import torch
        from transformers import Siglip2ImageProcessorPil
    except ImportError:
        print("torch and transformers are not installed: no comparison")
        return
    torch.set_num_threads(1)
    processor = Siglip2ImageProcessorPil(patch_size=16)
    for width, height in ((500, 375), (4000, 3000)):
        files = _photographs(width, height)
        for budget in (256, 1024):
            grids = geometry.grids_for(np.array([[height, width]] * len(files)), budget)

            def ours(files: list[bytes] = files, grids: np.ndarray = grids) -> None:
                table: dict[int, ImageLike] = dict(enumerate(files))
                _pixels(table, list(table), grids, [None] * len(grids), 16, "fast")

            def theirs(files: list[bytes] = files, budget: int = budget) -> None:
                for file in files:
                    image = Image.open(io.BytesIO(file)).convert("RGB")
                    processor(image, max_num_patches=budget, return_tensors="pt")

            a, b = _in_turns(ours, theirs, rounds)
            print(
                f"{width}x{height} at {budget:4} tokens: "
                f"{1000 * a / len(files):7.2f} ms an image; "
                f"transformers {1000 * b / len(files):7.2f}; "
                f"{b / a:.2f} times as fast",
                flush=True,
            )


def _in_turns(
    a: Callable[[], None], b: Callable[[], None], rounds: int
) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for call, call_times in zip((a, b), times, strict=True):
            with _timed() as seconds:
                call()
            call_times.append(seconds[0])
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def _photographs(width: int, height: int) -> list[bytes]:
    """The sample's photographs at one size, with sensor noise."""
    rng = np.random.default_rng(0)
    files = []
    for name in ("astronaut", "cat", "coffee_rotated", "rocket", "galaxies", "stairs"):
        image = Image.open(SAMPLE / f"{name}.jpg").convert("RGB")
        array = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        noise = rng.normal(0, 3, array.shape)
        noisy = np.clip(array + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    return files


def memory(batches: int) -> None:
    """Prints a worker process's resident memory over many batches, and its slope."""
    config = Config(
        data=DataConfig(
            train=Folder(path=str(SAMPLE)), budgets=(64, 256), rows=2, workers=1
        ),
        train=TrainConfig(steps=batches),
    )
    source = pipeline.open_source(config.data.train)
    samples = []
    with contextlib.closing(pipeline.train_batches(config, source)) as iterator:
        for step in itertools.count(1):
            if next(iterator, None) is None:
                break
            if step % 50 == 0:
                samples.append((step, _worker_kib()))
                print(f"batch {step:6}: {samples[-1][1] / 1024:8.1f} MiB", flush=True)
    later = np.array(samples[len(samples) // 4 :])  # once everything is loaded
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0]
    print(f"slope after the first quarter: {slope:+.3f} KiB a batch")


def _worker_kib() -> int:
    """Resident memory of the largest child process (Linux)."""
    sizes = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child}/status").read_text()
                sizes.append(int(status.split("VmRSS:")[1].split()[0]))
    if not sizes:
        raise OSError(f"process {os.getpid()} has no worker process")
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare pixels with transformers' processor, or measure a "
        "worker's memory."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="BATCHES")
    args = parser.parse_args()
    if args.memory:
        memory(args.memory)
    else:
        peers(args.rounds)


if __name__ == "__main__":
    main()
