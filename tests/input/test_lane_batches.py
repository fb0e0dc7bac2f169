"""Batches from lanes: each chunk is read once; hosts and workers change nothing."""

import io
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image

from navit.config import override
from navit.input import pipeline
from navit.input.chunks import ChunkReader
from navit.plan.batches import BatchPlans
from navit.sources import array_record, storage
from navit.sources.source import Record
from navit.sources.synthetic import SyntheticSource

CHUNK, WINDOW, COUNT = 8, 2, 240


def make_config(*options: str):
    shared = [
        "data.lanes=4",
        f"data.chunk={CHUNK}",
        f"data.window={WINDOW}",
        "data.open_rows=3",
        "data.rows=8",
        "data.caption_rows=2",
        f"data.train.size={COUNT}",
        "train.steps=14",
    ]
    return override(tiny_config(), [*shared, *options])


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


class Counting(SyntheticSource):
    """Counts how often each record is read, alone or among its neighbours."""

    def __init__(self, size: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__(size, 0)
        self.bad, self.alone, self.pieces = bad, [], []
        self.lock = threading.Lock()

    def record(self, index: int) -> Record:
        with self.lock:
            self.alone.append(index)
        return self._checked(index)

    def neighbours(self, indices) -> list[Record]:
        with self.lock:
            self.pieces.append(list(indices))
        return [self._checked(index) for index in indices]

    def _checked(self, index: int) -> Record:
        if index in self.bad:
            raise ValueError("it is damaged")
        return super().record(index)


@pytest.fixture(scope="module")
def batches():
    return list(pipeline.train_batches(make_config()))


def test_an_epoch_reads_each_chunk_once_and_nothing_alone(batches):
    config, source = make_config(), Counting(COUNT)
    assert_same(pipeline.train_batches(config, source), batches)
    plans = BatchPlans(source.sizes, config.data, patch_size=16, steps=14)
    assert plans.steps_per_epoch < 14
    used = [set(), set()]
    for step in range(14):
        rows = plans[step]
        used[rows.epoch] |= {*rows.index.tolist()}
    assert not source.alone
    read = [index for piece in source.pieces for index in piece]
    assert all(read.count(i) <= 2 for i in {*read})  # once an epoch
    assert used[0] | used[1] <= {*read}
    for piece in source.pieces:
        assert len({i // CHUNK for i in piece}) == 1
    chunks = {i // CHUNK for i in used[0]}, {i // CHUNK for i in used[1]}
    assert len(source.pieces) == len(chunks[0]) + len(chunks[1])


def test_hosts_workers_and_resuming_change_no_bit(batches):
    config = make_config()
    for hosts in (2, 4):
        parts = [
            list(pipeline.train_batches(config, process_index=i, process_count=hosts))
            for i in range(hosts)
        ]
        together = [
            jax.tree.map(lambda *x: np.concatenate(x), *of_step)
            for of_step in zip(*parts, strict=True)
        ]
        assert_same(together, batches)
    assert_same(pipeline.train_batches(config, start_step=5), batches[5:])
    for workers in (1, 2):
        found = pipeline.train_batches(
            make_config(f"data.workers={workers}"), start_step=3
        )
        assert_same(found, batches[3:])


def test_one_damaged_record_of_a_chunk_is_one_empty_slot(batches, caplog):
    config = make_config()
    bad = int(batches[0].id[0, 0])
    source = Counting(COUNT, (bad,))
    found = list(pipeline.train_batches(config, source))
    assert "it is damaged" in caplog.text
    lost = [batch.images.grids[batch.id == bad] for batch in found]
    assert sum(len(grids) for grids in lost) and not np.concatenate(lost).any()
    for one, other in zip(found, batches, strict=True):
        np.testing.assert_array_equal(one.id, other.id)
        others = (other.id >= 0) & (other.id != bad)
        assert (one.images.grids[others] > 0).all()


def test_no_more_is_held_than_two_windows_and_open_rows():
    config, source = make_config(), Counting(COUNT)
    plans = BatchPlans(source.sizes, config.data, patch_size=16, steps=14)
    for lane in range(4):
        reader = ChunkReader(source, plans, [lane])
        for step in range(14):
            reader.ahead(step)
            held = [future.result() for _, future in reader._reading.values()]
            # The window ahead, the one at hand, and what waits in open rows.
            assert sum(map(len, held)) <= 4 * WINDOW * CHUNK
            rows = plans.of_lanes(step, [lane])
            for index in rows.index.tolist():
                assert reader.take(rows.epoch, index).image is not None
        assert not source.alone


def write_tars(folder: Path, count: int = 3, images: int = 20) -> None:
    rng = np.random.default_rng(0)
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(images):
                buffer = io.BytesIO()
                pixels = rng.integers(0, 256, (40, 50 + i, 3), np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                members = {"jpg": buffer.getvalue(), "txt": f"image {i}".encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{shard}-{i}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_a_chunk_of_a_tar_is_one_read(tmp_path, monkeypatch):
    write_tars(tmp_path)
    source = pipeline.open_source(
        override(tiny_config(), [f"data.train=tars:{tmp_path}"]).data.train
    )
    reads, real = [], storage.Local.read_range

    def counted(self, path, start, size, **options):
        reads.append((path, start, size))
        return real(self, path, start, size, **options)

    monkeypatch.setattr(storage.Local, "read_range", counted)
    found = source.neighbours(range(16, 24))  # of two shards
    assert len(reads) == 2 and len({path for path, *_ in reads}) == 2
    monkeypatch.undo()
    for index, record in zip(range(16, 24), found, strict=True):
        alone = source.record(index)
        assert record.captions == alone.captions == (f"image {index % 20}",)
        assert record.image == alone.image.read()


def test_array_records_are_read_together(tmp_path, monkeypatch):
    writer = pytest.importorskip("array_record.python.array_record_module")
    from helpers import serialize_example

    file = writer.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    images = []
    for i in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (30 + i, 40)).save(buffer, "PNG")
        images.append(buffer.getvalue())
        example = {"image": images[-1], "caption": f"image {i}"}
        file.write(serialize_example(example))
    file.close()
    source = pipeline.open_source(
        override(tiny_config(), [f"data.train=array_record:{tmp_path}"]).data.train
    )
    monkeypatch.setattr(array_record.ArrayRecordReader, "record", None)
    found = source.neighbours(range(3, 9))
    assert [record.image for record in found] == images[3:9]
    assert found[0].captions == ("image 3",)
