"""navit.sources.stream, stream_plan: records in order only, as batches."""

import csv
import gzip
import io
import itertools
import logging
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers import serialize_example
from test_pipeline import assert_same

from navit.batch import Batch, PackedImages
from navit.config import (
    Classification,
    Config,
    Crop,
    DataConfig,
    ModelConfig,
    PositionConfig,
    Sides,
    Stream,
    Synthetic,
    TextConfig,
    TokenDrop,
    TrainConfig,
    VisionConfig,
)
from navit.input import pixels
from navit.input.pipeline import fingerprint, train_batches
from navit.input.stream_plan import StreamPlans
from navit.input.tokens import encode
from navit.plan import geometry
from navit.sources.kinds import open_source, open_train_source

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
STEPS = 12


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members(rows=ROWS) -> dict[str, bytes]:
    found = {}
    for row in rows:
        found[row["file"]] = (SAMPLE / row["file"]).read_bytes()
        found[f"{Path(row['file']).stem}.txt"] = row["caption"].encode()
    return found


def tfrecord_of(rows=ROWS) -> bytes:
    out = b""
    for row in rows:
        image = (SAMPLE / row["file"]).read_bytes()
        data = serialize_example({"image": image, "caption": row["caption"]})
        out += len(data).to_bytes(8, "little") + bytes(4) + data + bytes(4)
    return out


def config(path, steps: int = STEPS, **overrides) -> Config:
    defaults = dict(
        train=Stream(str(path), window=60),
        eval=Synthetic(size=3),
        budgets=(9, 16),
        row_tokens=48,
        rows=2,
        slots=4,
        open_rows=2,
    )
    return Config(
        model=ModelConfig(text=TextConfig(length=24)),
        data=DataConfig(**{**defaults, **overrides}),
        train=TrainConfig(steps=steps),
    )


def batches(cfg: Config, **options) -> list[Batch]:
    source = open_train_source(cfg.data.train)
    return list(train_batches(cfg, source, **options))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The sample in three compressed tars."""
    folder = tmp_path_factory.mktemp("stream")
    for i in range(3):
        data = gzip.compress(tar_of(members(ROWS[i::3])))
        (folder / f"{i}.tar.gz").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def one_run(shards) -> list[Batch]:
    return batches(config(shards))


def test_batches_hold_the_records_each_once_an_epoch(shards, one_run):
    source = open_train_source(Stream(str(shards)))
    records = {r.captions[0]: r for r in source.read(range(3))}
    by_text = {tuple(encode([text], 24)[0].tolist()): records[text] for text in records}
    seen: dict[int, str] = {}
    for batch in one_run:
        PackedImages(*batch.images).check()
        batch.check()
        empty = batch.id < 0
        np.testing.assert_array_equal(empty, batch.images.grids.prod(-1) == 0)
        assert (batch.label == -1).all() and not batch.text[empty].any()
        for row, slot in np.argwhere(~empty):
            record = by_text[tuple(batch.text[row, slot].tolist())]
            number = int(batch.id[row, slot])
            assert number not in seen
            seen[number] = record.name
            assert tuple(batch.size[row, slot]) == record.size
            rows, columns = batch.images.grids[row, slot].tolist()
            grids = [
                geometry.grid_for(*record.size, patch_size=16, max_tokens=budget)
                for budget in (9, 16)
            ]
            assert (rows, columns) in grids
            expected = np.zeros((rows * columns, 768), np.uint8)
            image = pixels.load(record.image, rows * 16, columns * 16)
            pixels.to_patches(image, 16, expected)
            mine = batch.images.segment_ids[row] == slot + 1
            np.testing.assert_array_equal(batch.images.patches[row, mine], expected)
    epochs = [
        [name for number, name in seen.items() if number // len(ROWS) == epoch]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(r.name for r in records.values())
    assert len(set(epochs[1])) == len(epochs[1])
    orders = [tuple(seen[i] for i in range(start, start + 17)) for start in (0, 17, 34)]
    assert len(set(orders)) > 1  # of the files


@pytest.mark.parametrize("start", [1, 7, STEPS])
def test_a_run_resumes_with_the_same_batches(shards, one_run, start):
    assert_same(batches(config(shards), start_step=start), one_run[start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, one_run, workers):
    found = batches(config(shards, steps=6, workers=workers), start_step=1)
    assert_same(found, one_run[1:6])


def test_a_thread_that_lags_does_not_have_the_stream_read_again(
    shards, one_run, monkeypatch
):
    get, begin, begun = StreamPlans.__getitem__, StreamPlans._start_again, []

    def late(plans, step):
        time.sleep(0.5 if step == 2 else 0)
        return get(plans, step)

    monkeypatch.setattr(StreamPlans, "__getitem__", late)
    monkeypatch.setattr(
        StreamPlans, "_start_again", lambda plans: begun.append(1) or begin(plans)
    )
    assert_same(batches(config(shards)), one_run)
    assert len(begun) == 1


DRAWS = dict(
    crop=Crop(),
    flip=True,
    drop=TokenDrop(kind="beta", rate=0.3, final_rate=0.3),
    sides=Sides(low=32, high=80),
)


@pytest.mark.parametrize("draws", [{}, DRAWS])
def test_the_rows_of_two_hosts_are_the_batch_of_one(shards, one_run, draws):
    cfg = config(shards, **draws)
    whole = batches(cfg)
    hosts = [batches(cfg, process_index=i, process_count=2) for i in range(2)]
    together = [
        Batch(
            PackedImages(*map(np.concatenate, zip(a.images, b.images, strict=True))),
            *map(np.concatenate, zip(a[1:], b[1:], strict=True)),
        )
        for a, b in zip(*hosts, strict=True)
    ]
    assert_same(together, whole)
    for batch in whole:
        PackedImages(*batch.images).check() if not draws else None
    same = all(
        np.array_equal(a.images.patches, b.images.patches)
        for a, b in zip(whole, one_run, strict=True)
    )
    assert same == (not draws)


def test_every_kind_of_file_gives_the_same_batches(tmp_path):
    remote = fsspec.filesystem("memory")
    written = {"a.tar": tar_of(members()), "c.tfrecord-00000-of-00001": tfrecord_of()}
    written |= {f"{name}.gz": gzip.compress(d) for name, d in [*written.items()]}
    written["b.tgz"] = written["a.tar.gz"]
    expected = None
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
        found = batches(config(tmp_path / name, steps=4))
        expected = expected or found
        assert_same(found, expected)
    remote.pipe("/stream/b.tgz", written["b.tgz"])
    assert_same(batches(config("memory://stream/b.tgz", steps=4)), expected)


def test_unreadable_records_are_counted_named_and_not_fatal(tmp_path, caplog):
    names = [row["file"] for row in ROWS[:8]]
    broken = members(ROWS[:8])
    broken[names[1]] = b"no image"
    broken[names[2]] = broken[names[2]][:300]  # its pixels are cut off
    del broken[f"{Path(names[3]).stem}.txt"]
    del broken[names[4]]
    whole = gzip.compress(tar_of(members(ROWS[8:])))
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(tar_of(broken)))
    (tmp_path / "1.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar").write_bytes(b"nothing that a tar would be" * 99)
    source = open_train_source(Stream(str(tmp_path)))
    read = list(source.read(range(3)))
    errors = [r.error for r in read]
    assert sum(map(bool, errors)) == 6 and len(read) > 12
    assert errors[0].startswith("damaged") and errors[-1].startswith("damaged")
    with caplog.at_level(logging.WARNING, logger="navit"):
        found = batches(config(tmp_path, steps=14))
    lost = sum(int(((b.id >= 0) & (b.images.grids.prod(-1) == 0)).sum()) for b in found)
    named = [record.getMessage() for record in caplog.records]
    assert lost > len(named) == len({*named}) == 6  # each once
    for name, reason in [
        (Path(names[1]).stem, "not an image"),
        (Path(names[3]).stem, "no caption"),
        (Path(names[4]).stem, "no encoded image"),
        ("1.tar.gz", "damaged from here on"),
        ("2.tar", "damaged from here on"),
    ]:
        found_in = [r.getMessage() for r in caplog.records if name in r.getMessage()]
        assert found_in and all(reason in line for line in found_in)
    for batch in found:
        PackedImages(*batch.images).check()
        batch.check()


def test_a_tar_that_ends_between_two_members_is_damaged(tmp_path):
    data = tar_of(members(ROWS[:2]))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[2].offset
    (tmp_path / "a.tar").write_bytes(data[:at])
    first, end = open_train_source(Stream(str(tmp_path))).read([0])
    assert not first.error and "end is missing" in end.error


def test_a_stream_without_one_usable_record_stops(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.jpg": b"x", "a.txt": b"x"}))
    with pytest.raises(ValueError, match="not one record of the stream is usable"):
        batches(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_train_source(Stream(str(tmp_path / "nowhere")))


def test_the_caption_may_be_a_field(tmp_path):
    row = members(ROWS[:1])
    name = Path(ROWS[0]["file"]).stem
    row[f"{name}.json"] = b'{"caption": "c", "meta": {"title": ["t", "u"]}}'
    (tmp_path / "a.tar").write_bytes(tar_of(row))
    for caption, expected in [
        ("", (ROWS[0]["caption"],)),
        ("json.meta.title", ("t", "u")),
        ("json.caption", ("c",)),
    ]:
        source = open_train_source(Stream(str(tmp_path), caption=caption))
        (record,) = source.read([0])
        assert record.captions == expected
    (record,) = open_train_source(Stream(str(tmp_path), caption="json.no")).read([0])
    assert "'no'" in record.error


@pytest.mark.parametrize("captions", [14, 5])
def test_the_captions_of_a_group_of_rows_are_one_list(shards, captions):
    grouped = dict(rows=4, caption_rows=2, captions=captions)
    whole = batches(config(shards, **grouped))
    hosts = [
        batches(config(shards, **grouped), process_index=i, process_count=2)
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *hosts, strict=True):
        PackedImages(*batch.images).check()
        batch.check()
        assert batch.text.shape == (2, captions, 24)
        counts = (batch.id.reshape(2, -1) >= 0).sum(1)
        assert batch.text.any(-1).sum(1).tolist() == counts.tolist()
        assert (counts == captions).all() == (captions == 5)
        for field in ("text", "id"):
            together = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, field))
    plain = batches(config(shards, rows=4))
    ids = [set(b.id[b.id >= 0].tolist()) for b in whole]
    wanted = [set(b.id[b.id >= 0].tolist()) for b in plain]
    assert all(a <= b for a, b in zip(ids, wanted, strict=True))
    assert (ids == wanted) == (captions == 14)


def test_the_fingerprint_is_of_the_files(tmp_path, shards):
    source = open_train_source(Stream(str(shards)))
    assert fingerprint(source) == fingerprint(open_train_source(Stream(str(shards))))
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() + b"\0")
    other = open_train_source(Stream(str(tmp_path)))
    assert fingerprint(other) != fingerprint(source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"elastic": 0.1}, r"data.elastic=0.1 needs .* random access"),
        ({"budget_per": "batch"}, r"data.budget_per=batch needs .* random access"),
        ({"slots": None}, "set data.slots"),
        ({"caption_rows": 2}, "set data.captions for data.caption_rows=2"),
        ({"eval": None}, "set data.eval"),
    ],
)
def test_what_needs_all_sizes_is_refused(shards, options, words):
    with pytest.raises(ValueError, match=words):
        config(shards, **options)


def test_what_needs_random_access_is_refused(shards):
    with pytest.raises(ValueError, match=r"has no random access.*TarShards"):
        open_source(Stream(str(shards)))
    with pytest.raises(ValueError, match="a Stream has no labels"):
        Config(
            model=ModelConfig(vision=VisionConfig(num_classes=3)),
            data=config(shards).data,
            train=TrainConfig(losses=(Classification(),)),
        )
    vision = VisionConfig(position=PositionConfig(kind="learned_2d", size=15))
    cfg = Config(model=ModelConfig(vision=vision), data=config(shards).data)
    with pytest.raises(ValueError, match="ends at 15"):
        batches(cfg)
    with pytest.raises(ValueError, match=r"rows=2 .* 3 processes"):
        batches(config(shards), process_count=3)


def test_steps_may_be_asked_for_in_any_order(shards):
    cfg = config(shards)
    source = open_train_source(cfg.data.train)
    plans = StreamPlans(source, cfg.data, patch_size=16, steps=8)
    numbers = [plans[step].numbers.tolist() for step in range(8)]
    for step in (3, 2, 5, 4, 0, 7, 7):
        assert plans[step].numbers.tolist() == numbers[step]
    assert len(set(itertools.chain(*numbers))) == sum(map(len, numbers))
