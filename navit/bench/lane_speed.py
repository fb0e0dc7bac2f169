"""Measures lanes (`data.lanes`): their padding, order, planning, and reading.

  python -m navit.bench.lane_speed              # padding, order and planning
  python -m navit.bench.lane_speed --sizes 1e9  # a host's share of 10^9 images
  python -m navit.bench.lane_speed --sizes 1e9 --group 100  # in Parquet's row groups
  python -m navit.bench.lane_speed --store 8000 --workers 2  # reading from a store

The object store is one of our own (`navit/bench/object_store.py`), in a process that
shares the cores of this machine: every request takes 30 ms, 1 % of them fail, and at
most 1000 are answered in a second. It needs `pip install "fsspec[http]"`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from navit.bench.object_store import Store, serve
from navit.config import Config, DataConfig, ModelConfig, TarShards, TrainConfig
from navit.input import pipeline
from navit.plan.batches import BatchPlans
from navit.plan.epoch import plan_block
from navit.plan.lanes import chunk_ends
from navit.plan.order import Part
from navit.sources.cache import Place, read_arrays, write_arrays
from navit.sources.synthetic import photographs

_NAFLEX = DataConfig(
    budgets=(128, 256, 576, 784, 1024), row_tokens=4096, rows=64, slots=16
)
# Images of a shard; lanes that read, and the chunks of their windows, few enough for
# several windows in an epoch; rounds of reading.
_SHARD, _LANES, _WINDOW, _ROUNDS = 1000, 8, 2, 3
# Blocks of a lane that are planned to measure the speed.
_BLOCKS = 4
_SAMPLE = Path(__file__).parents[2] / "data/sample"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500_000, help="to plan")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--hosts", type=int, default=64, help="for --sizes")
    parser.add_argument("--sizes", type=float, help="plan this many images")
    parser.add_argument("--group", type=int, help="records of a row group, for --sizes")
    parser.add_argument("--store", type=int, metavar="N", help="read N images")
    parser.add_argument("--workers", type=int, default=0, help="for --store")
    args = parser.parse_args()
    if args.store:
        reading(args.store, args.workers)
    elif args.sizes:
        planning(int(args.sizes), args.lanes, args.hosts, args.group)
    else:
        padding(args.images, args.lanes)


def padding(images: int, lanes: int) -> None:
    """Prints padding, images left out, and how mixed batches are."""
    sizes = photographs(images)
    print(f"{images} images, rows of 4096 tokens, NaFlex's budgets, shards of {_SHARD}")
    print(f"{'':14} padding  left out  same shard in a batch  images/s planned")
    for count in (0, lanes):
        data = dataclasses.replace(_NAFLEX, lanes=count)
        start = time.process_time()
        plans = BatchPlans(sizes, data, patch_size=16, steps=10**9)
        steps = plans.steps_per_epoch
        rows = [plans[step] for step in range(steps)]
        seconds = time.process_time() - start
        used = sum(len(part.index) for part in rows)
        tokens = sum(int(part.lengths.sum()) for part in rows)
        total = steps * data.rows * data.row_tokens
        print(
            f"{f'{count} lanes' if count else 'one order':14} "
            f"{1 - tokens / total:7.2%}  {1 - used / images:8.2%}  "
            f"{_same_shard(rows):21.2%}  {used / seconds:16,.0f}",
            flush=True,
        )
    print(f"in a random order, {_SHARD / images:.2%} of the pairs share a shard")


def planning(images: int, lanes: int, hosts: int, group: int | None) -> None:
    """Prints how fast one host plans its lanes, and with how much memory.

    Args:
      group: the records that are read in one piece, as of Parquet's row groups; None
        for tar shards.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), "the sizes", "")
        shapes = {"sizes": (np.dtype(np.int32), (images, 2))}
        write_arrays(place, "sizes", shapes, lambda _: {}, sparse=True)
        start = time.perf_counter()
        stored = read_arrays(place, "sizes")
        assert stored is not None
        sizes = _Filled(stored.arrays["sizes"])
        opened = time.perf_counter() - start
        data = dataclasses.replace(_NAFLEX, lanes=lanes)
        parts = []
        if group:
            ends = np.append(np.arange(group, images, group), images)
            parts = [Part(0, images, 1.0, chunk_ends(ends, data))]
        plans = BatchPlans(
            sizes,  # type: ignore[arg-type]
            data,
            patch_size=16,
            steps=1000,
            parts=parts,
            process_index=hosts - 1,
            process_count=hosts,
        )
        began = time.perf_counter() - start - opened
        start, used = time.process_time(), 0
        for block in range(1, 1 + _BLOCKS):
            rows = plan_block(
                sizes,  # type: ignore[arg-type]
                data,
                patch_size=16,
                epoch=0,
                block=block,
                lane=lanes - 1,
                parts=parts,
                slots=plans.slots,
            )
            used += len(rows.index)
        rate = used / (time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{images:.3g} images, {lanes} lanes, {hosts} hosts: opened in {opened:.3f} s, "
        f"first plans in {began:.1f} s, then {rate:,.0f} images/s a core; peak memory "
        f"{peak:.2f} GiB"
    )


class _Filled:
    """Sizes in a sparse file, whose holes stand for photographs of about 480 x 640."""

    def __init__(self, stored: np.ndarray) -> None:
        self._stored = stored
        self._drawn = np.random.default_rng(0).integers(240, 960, (2**18, 2), np.int32)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        found = np.asarray(self._stored[key])
        return np.where(found == 0, self._drawn[: len(found)], found)


def reading(images: int, workers: int) -> None:
    """Prints images per second from a disk and from a store, with and without lanes.

    Disk and store take turns, as other work on the machine would otherwise favour one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write(folder, images)
        with serve(folder) as store:
            names = ",".join(file.name for file in sorted(folder.iterdir()))
            url = f"{store.url}/{{{names}}}"
            places = {"disk, lanes": str(folder), "store, lanes": url}
            print(
                f"{images} images in {size / 1e6:.0f} MB of tar shards, {workers} "
                f"workers\n{'':18} images/s  first batch  requests  failed  bytes read"
            )
            rates: dict[str, list[float]] = {label: [] for label in places}
            for _ in range(_ROUNDS):
                for label, path in places.items():
                    rate = _timed(label, path, images, _LANES, workers, store, size)
                    rates[label].append(rate)
            few = max(64, images // 40)
            order = _timed("store, one order", url, few, 0, workers, store, size)
    disk, lanes = (float(np.median(found)) for found in rates.values())
    print(
        f"lanes read {lanes / order:.1f} times as fast as one order, and at "
        f"{lanes / disk:.0%} of the disk's rate (medians of {_ROUNDS} rounds)"
    )


def _timed(
    label: str,
    path: str,
    images: int,
    lanes: int,
    workers: int,
    store: Store,
    size: int,
) -> float:
    """Prints and returns an epoch's images per second, from its second batch on.

    Args:
      images: stops after as many.
      size: the bytes of the data.
    """
    config = _config(path, lanes, workers)
    source = pipeline.open_source(config.data.train)
    plans = BatchPlans(source.sizes, config.data, patch_size=16, steps=10**6)
    train = dataclasses.replace(config.train, steps=plans.steps_per_epoch)
    store.counts()  # those of the index
    begun = time.perf_counter()
    batches = pipeline.train_batches(dataclasses.replace(config, train=train), source)
    next(batches)
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += int((batch.images.grids[..., 0] > 0).sum())
        if seen >= images:
            break
    rate = seen / (time.perf_counter() - start)
    batches.close()
    counts = store.counts()
    print(
        f"{label:18} {rate:8.1f} {start - begun:10.1f} s  {counts.requests:8}  "
        f"{counts.failed:6}  {counts.sent / size:9.1%}",
        flush=True,
    )
    return rate


def _config(path: str, lanes: int, workers: int) -> Config:
    data = DataConfig(
        train=TarShards(path),
        budgets=(256,),
        row_tokens=1024,
        rows=16,
        slots=8,
        lanes=lanes,
        window=_WINDOW,
        workers=workers,
    )
    return Config(data=data, model=ModelConfig(), train=TrainConfig(steps=1))


def _write(folder: Path, images: int) -> int:
    """Writes shards of JPEG photographs with captions; returns their bytes."""
    photographs = []
    for file in sorted(_SAMPLE.glob("*.jpg")):
        with Image.open(file) as opened:
            photograph = opened.convert("RGB")
        for side in range(400, 640, 20):
            scale = side / max(photograph.size)
            size = [max(16, round(x * scale)) for x in photograph.size]
            buffer = io.BytesIO()
            photograph.resize(size).save(buffer, "JPEG", quality=90)
            photographs.append(buffer.getvalue())
    order = np.random.default_rng(0).integers(len(photographs), size=images)
    total = 0
    for first in range(0, images, _SHARD):
        path = folder / f"{first // _SHARD:04}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(first, min(first + _SHARD, images)):
                members = {"jpg": photographs[order[i]], "txt": b"a photograph"}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        total += path.stat().st_size
    return total


def _same_shard(rows: Iterable) -> float:
    """The share of the pairs of a batch's images that lie in one shard."""
    shares = []
    for part in rows:
        counts = np.bincount(part.index // _SHARD)
        total = int(counts.sum())
        same = int((counts * (counts - 1)).sum())
        shares.append(same / max(1, total * (total - 1)))
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
