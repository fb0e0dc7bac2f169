"""Batches from lanes: each chunk is read once; hosts and workers change nothing."""

import io
import itertools
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import tiny_config
from PIL import Image
from stores import serve

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


def on_hosts(config, count, start, stop):
    """The global batches of steps `start` to `stop`, of a run of so many hosts."""
    parts = []
    for i in range(count):
        found = pipeline.train_batches(
            config, start_step=start, process_index=i, process_count=count
        )
        parts.append(list(itertools.islice(found, stop - start)))
        found.close()
    return [
        jax.tree.map(lambda *x: np.concatenate(x), *of_step)
        for of_step in zip(*parts, strict=True)
    ]


def assert_only_steps_matter(config, batches):
    """Hosts, workers and resuming change no bit."""
    for hosts in (2, 4):
        assert_same(on_hosts(config, hosts, 0, len(batches)), batches)
    assert_same(pipeline.train_batches(config, start_step=5), batches[5:])
    for workers in (1, 2):
        found = override(config, [f"data.workers={workers}"])
        assert_same(pipeline.train_batches(found, start_step=3), batches[3:])


def test_hosts_workers_and_resuming_change_no_bit(batches):
    assert_only_steps_matter(make_config(), batches)


def test_a_run_moves_from_4_to_2_to_8_hosts_across_an_epochs_end():
    config = make_config("data.lanes=8", "data.rows=16", "train.steps=9")
    batches = list(pipeline.train_batches(config))
    source = pipeline.open_source(config.data.train)
    plans = BatchPlans(source.sizes, config.data, patch_size=16, steps=9)
    assert 2 < plans.steps_per_epoch < 5  # it ends on 2 hosts
    moved = [
        batch
        for hosts, start, stop in ((4, 0, 2), (2, 2, 5), (8, 5, 9))
        for batch in on_hosts(config, hosts, start, stop)
    ]
    assert_same(moved, batches)


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


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two files of 64 images, in row groups of 5, of which one is unreadable."""
    folder = tmp_path_factory.mktemp("parquet")
    rng = np.random.default_rng(0)
    for file in range(2):
        images = []
        for i in range(64):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (40, 50 + i, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append(b"no image" if (file, i) == (0, 7) else buffer.getvalue())
        columns = {"image": images, "caption": ["x"] * 64, "other": ["y" * 9999] * 64}
        path = folder / f"{file}.parquet"
        pa.parquet.write_table(pa.table(columns), path, row_group_size=5)
    return folder


def parquet_config(path, *options: str):
    return override(make_config(), [f"data.train=parquet:{path}", *options])


def test_each_row_group_is_read_once_in_an_epoch(parquet, monkeypatch):
    """Chunks end where row groups end: one request for each group, and no other byte.

    Here the chunks of 8 records that other sources have would cut most groups in two.
    """
    store = serve(monkeypatch, parquet)
    config = parquet_config("store://{0..1}.parquet")
    source = pipeline.open_source(config.data.train)
    assert len(source) == 127 and source.groups[:3].tolist() == [5, 9, 14]
    parts = pipeline.parts_of(source, config.data)
    plans = BatchPlans(source.sizes, config.data, patch_size=16, steps=1, parts=parts)
    steps = plans.steps_per_epoch
    config = override(config, [f"train.steps={steps}"])
    store.reads.clear()
    used = set()
    for batch in pipeline.train_batches(config, source):
        assert (batch.images.grids[batch.id >= 0] > 0).all()
        used |= {*batch.id[batch.id >= 0].tolist()}
    assert len(used) > 0.8 * len(source)
    groups = np.searchsorted(source.groups, [*used], "right")
    assert len(store.reads) == len({*store.reads}) == len({*groups.tolist()})
    data = 0  # the bytes of the columns that are used
    for path in parquet.iterdir():
        metadata = pa.parquet.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in (0, 1)]
            data += sum(column.total_compressed_size for column in columns)
    assert sum(size for *_, size in store.reads) <= 1.05 * data


def test_row_groups_change_no_bit_between_hosts_and_workers(parquet):
    config = parquet_config(parquet, "train.steps=9")
    assert_only_steps_matter(config, list(pipeline.train_batches(config)))


def test_other_row_groups_are_other_data_for_lanes(parquet, tmp_path):
    """The batches differ, so no run goes on with them."""
    for path in parquet.iterdir():
        table = pa.parquet.read_table(path)
        pa.parquet.write_table(table, tmp_path / path.name, row_group_size=3)
    found = {}
    for lanes in (0, 4):
        configs = [
            parquet_config(folder, f"data.lanes={lanes}")
            for folder in (parquet, tmp_path)
        ]
        found[lanes] = {
            pipeline.fingerprint(pipeline.open_source(x.data.train), x.data)
            for x in configs
        }
    assert len(found[0]) == 1 and len(found[4]) == 2
