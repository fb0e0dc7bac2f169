"""navit.reshard: any source as tar shards, and the way back."""

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import logging
import shutil
import tarfile
import zlib
from pathlib import Path

import fsspec
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from helpers import read_image, serialize_example, tiny_config

from navit import reshard as writer
from navit.cli import main
from navit.config import (
    ArrayRecords,
    Folder,
    ParquetImages,
    Synthetic,
    TarShards,
    Tfds,
    TfRecords,
)
from navit.input.pipeline import train_batches
from navit.reshard import reshard
from navit.sources import in_order
from navit.sources.index import Share, Unfinished
from navit.sources.kinds import open_source
from navit.sources.local_cache import LocalCache

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
CLASSES = sorted({row["label"] for row in ROWS})


def image(row: dict) -> bytes:
    return (SAMPLE / row["file"]).read_bytes()


def label(row: dict) -> int:
    return CLASSES.index(row["label"])


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
        key = Path(row["file"]).stem
        found[row["file"]] = image(row)
        found[f"{key}.txt"] = row["caption"].encode()
        found[f"{key}.cls"] = str(label(row)).encode()
    return found


def tfrecord_of(examples: list[bytes]) -> bytes:
    """Without the checksums, which navit does not read."""
    framed = (len(x).to_bytes(8, "little") + bytes(4) + x + bytes(4) for x in examples)
    return b"".join(framed)


def examples(rows=ROWS) -> list[bytes]:
    return [
        serialize_example(
            {"image": image(row), "caption": row["caption"], "label": label(row)}
        )
        for row in rows
    ]


class Numbered(tfds.core.GeneratorBasedBuilder):
    """The sample with nested captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row in ROWS:
            yield (
                row["file"],
                {
                    "image": io.BytesIO(image(row)),
                    "captions": [{"text": row["caption"]}],
                    "label": row["label"],
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A TFDS dataset as TensorFlow writes it: TFRecord of the same examples."""
    root = tmp_path_factory.mktemp("tfds")
    Numbered(data_dir=root, file_format="array_record").download_and_prepare()
    (stored,) = root.rglob("*.array_record*")
    reader = ArrayRecordReader(str(stored))
    records = reader.read(0, reader.num_records())
    name = stored.name.replace("array_record", "tfrecord")
    stored.with_name(name).write_bytes(tfrecord_of(records))
    stored.unlink()
    info = stored.parent / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory, prepared) -> dict:
    root = tmp_path_factory.mktemp("sources")
    for i in range(3):
        part = slice(6 * i, 6 * i + 6)
        data = tar_of(members(ROWS[part]))
        records = tfrecord_of(examples(ROWS[part]))
        for name, content in {
            f"{i}.tar": data,
            f"{i}.tar.gz": gzip.compress(data),
            f"{i}.tfrecord": records,
            f"{i}.tfrecord.gz": gzip.compress(records),
        }.items():
            (root / name).write_bytes(content)
    table = {
        "image": [{"bytes": image(row)} for row in ROWS],
        "caption": [row["caption"] for row in ROWS],
        "label": [row["label"] for row in ROWS],
    }
    pq.write_table(pa.table(table), root / "rows.parquet", row_group_size=4)
    return {
        "tar": TarShards(f"{root}/*.tar"),
        "tar.gz": TarShards(f"{root}/*.tar.gz"),
        "tfrecord": TfRecords(f"{root}/*.tfrecord"),
        "tfrecord.gz": TfRecords(f"{root}/*.tfrecord.gz"),
        "tfds": Tfds("numbered", data_dir=str(prepared), caption="captions.text"),
        "folder": Folder(str(SAMPLE)),
        "parquet": ParquetImages(str(root / "rows.parquet")),
    }


def contents(source) -> list[tuple]:
    """Each image's bytes, captions and label, in the order of the source."""
    task = source.tasks["label"]
    return [
        (read_image(source, i), source.record(i).captions, int(task.labels[i]))
        for i in range(len(source))
    ]


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def sample() -> list[tuple]:
    return contents(open_source(Folder(str(SAMPLE))))


@pytest.mark.parametrize(
    "kind", ["tar", "tar.gz", "tfrecord", "tfrecord.gz", "tfds", "folder", "parquet"]
)
def test_bytes_captions_and_labels_come_back_in_order(sources, sample, tmp_path, kind):
    shards = reshard(sources[kind], str(tmp_path / "out"), images=4)
    source = open_source(shards)
    found = contents(source)
    if kind == "tfds":  # it has an order of its own
        found, sample = sorted(found), sorted(sample)
    assert found == sample
    named = kind in ("tfds", "folder", "parquet")
    names = tuple(CLASSES) if named else tuple(map(str, range(len(CLASSES))))
    assert source.tasks["label"].class_names == names
    assert (source.left_out, source.damaged) == (0, 0)
    for path in tmp_path.glob("out/*.tar"):
        with tarfile.open(path) as tar:
            assert 3 <= len(tar.getnames()) <= 4 * 3


def test_training_on_the_shards_sees_the_batches_of_the_folder(tmp_path):
    config = tiny_config(steps=6)
    shards = reshard(Folder(str(SAMPLE)), str(tmp_path), images=5)
    runs = [
        list(
            train_batches(
                dataclasses.replace(
                    config, data=dataclasses.replace(config.data, train=source)
                )
            )
        )
        for source in (Folder(str(SAMPLE)), shards)
    ]
    for one, other in zip(*runs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", ["tar.gz", "tfrecord", "folder"])
def test_two_processes_write_what_one_writes(sources, tmp_path, kind):
    reshard(sources[kind], str(tmp_path / "one"), images=4)
    two = str(tmp_path / "two")
    with pytest.raises(Unfinished, match="process 1 of 2 is done, and others are not"):
        reshard(sources[kind], two, images=4, share=Share(process=1, processes=2))
    reshard(sources[kind], two, images=4, share=Share(process=0, processes=2))
    assert shards_in(tmp_path / "two") == shards_in(tmp_path / "one")


@pytest.mark.parametrize("kind", ["tar.gz", "folder"])
def test_a_run_that_was_killed_writes_only_what_is_missing(
    sources, tmp_path, monkeypatch, kind
):
    whole = reshard(sources[kind], str(tmp_path / "whole"), images=4)
    out, opened = tmp_path / "out", []
    place = writer._Folder.file

    @contextlib.contextmanager
    def dies_in_the_fourth(folder, name):
        with place(folder, name) as path:
            yield path
            opened.append(name)
            if len(opened) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(writer._Folder, "file", dies_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        reshard(sources[kind], str(out), images=4)
    assert sorted(shards_in(out)) == opened[:3]
    left = out / f".{opened[3]}.killed"  # as SIGKILL leaves it
    left.mkdir()
    (left / opened[3]).write_bytes(b"half")
    again = reshard(sources[kind], str(out), images=4)
    assert shards_in(out) == shards_in(tmp_path / "whole") and not left.exists()
    assert len({*opened}) == len(opened) - 1  # only the fourth was written twice
    assert contents(open_source(again)) == contents(open_source(whole))
    opened.clear()
    reshard(sources[kind], str(out), images=4)
    assert not opened


def test_tars_keep_their_keys_and_all_their_members(tmp_path):
    given = {
        "a/x.png": image(ROWS[0]),
        "a/x.json": b'{"caption": "c", "url": "u"}',
        "a/x.npy": b"vector",
        "b.JPG": image(ROWS[1]),
        "b.txt": b" spaces \n",
    }
    (tmp_path / "0.tgz").write_bytes(gzip.compress(tar_of(given)))
    shards = reshard(TarShards(f"{tmp_path}/*.tgz"), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000-00000.tar") as tar:
        found = {x.name: tar.extractfile(x).read() for x in tar}
    assert found == {name.replace("JPG", "jpg"): data for name, data in given.items()}
    source = open_source(shards)
    assert [source.record(i).captions for i in range(2)] == [("c",), ("spaces",)]
    again = TarShards(f"{tmp_path}/*.tgz", caption="txt")  # of the same shards
    source = open_source(reshard(again, str(tmp_path / "out")))
    assert [source.record(i).captions for i in range(len(source))] == [("spaces",)]


def test_several_captions_and_none_come_back(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog")
    records = [
        {"image": image(ROWS[0]), "caption": ["one", "two"], "label": -1},
        {"image": image(ROWS[1]), "label": 1},
        {"image": image(ROWS[2]), "caption": "three"},
    ]
    (tmp_path / "a.tfrecord").write_bytes(
        tfrecord_of([*map(serialize_example, records)])
    )
    source = TfRecords(str(tmp_path / "a.tfrecord"), classes=str(names))
    found = open_source(reshard(source, str(tmp_path / "out")))
    captions = [found.record(i).captions for i in range(3)]
    assert captions == [("one", "two"), ("dog",), ("three",)]
    assert found.tasks["label"].labels.tolist() == [-1, 1, -1]


def test_half_a_surrogate_pair_comes_back(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(ROWS[0]))
    row = {"file": "a.jpg", "caption": "\ud83d"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    found = open_source(reshard(Folder(str(tmp_path)), str(tmp_path / "out")))
    assert found.record(0).captions == ("\ud83d",)


def test_what_cannot_be_used_is_left_out_named_and_counted(tmp_path, caplog):
    first = members(ROWS[:8])
    names = [row["file"] for row in ROWS]
    first[names[1]] = b"no image"
    del first[names[2]]
    first |= {"../up.jpg": image(ROWS[3]), "/root.jpg": image(ROWS[3])}
    twice = tar_of({names[4]: image(ROWS[4])})  # a key that the shard has already
    end = tar_of(first)
    end = end[: end.rstrip(b"\0").__len__() // 512 * 512 + 512]
    whole = gzip.compress(tar_of(members(ROWS[8:])))
    (tmp_path / "0.tar").write_bytes(end + twice)
    (tmp_path / "1.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar").write_bytes(b"nothing that a tar would be" * 99)
    cut = tar_of(members(ROWS[:2]))
    with tarfile.open(fileobj=io.BytesIO(cut)) as tar:
        cut = cut[: tar.getmembers()[3].offset]  # between two members
    (tmp_path / "3.tar").write_bytes(cut)
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING, logger="navit"):
        found = open_source(reshard(TarShards(str(tmp_path)), str(out)))
    lines = [record.getMessage() for record in caplog.records]
    stem = [Path(name).stem for name in names]
    for name, why in [
        (f"0.tar: {stem[1]}", "not an image"),
        (f"0.tar: {stem[2]}", "no image"),
        ("0.tar: ../up", "leads out of a folder"),
        ("0.tar: /root", "leads out of a folder"),
        (f"0.tar: {stem[4]}", "its key comes twice"),
        ("1.tar.gz", "ended before the end"),
        ("2.tar", "invalid header"),
        ("3.tar", "its end is missing"),
    ]:
        found_in = [line for line in lines if name in line]
        assert len(found_in) == 1 and why in found_in[0], (name, lines)
    assert any("5 records are left out, and the rest of 3 damaged" in x for x in lines)
    reports = [json.loads(x.read_text()) for x in out.glob(".navit/reshard/*.json")]
    assert sum(len(report["left_out"]) for report in reports) == 5
    assert sum(bool(report["damage"]) for report in reports) == 3
    usable = [row for row in ROWS[:8] if row["file"] not in names[1:3]]
    got = [read_image(found, i) for i in range(len(found))]
    assert got[:6] == [image(row) for row in usable]
    assert got[6] == image(ROWS[0])  # of 3.tar, as 1.tar.gz comes after all .tar
    assert got[7:] == [image(row) for row in ROWS[8 : 8 + len(got) - 7]]
    assert 4 < len(got) - 6 < 9
    assert not [*tmp_path.parent.glob("up*")]


def test_a_truncated_gzip_is_used_up_to_the_damage(tmp_path):
    whole = tar_of(members())
    packed = gzip.compress(whole)[:-2000]
    (tmp_path / "0.tar.gz").write_bytes(packed)
    readable = len(zlib.decompressobj(wbits=31).decompress(packed))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [x.offset_data + x.size for x in tar if x.name.endswith(".cls")]
    usable = sum(end <= readable for end in ends)
    found = open_source(reshard(TarShards(str(tmp_path)), str(tmp_path / "out")))
    assert 0 < usable <= len(found) <= usable + 1 < len(ROWS) + 1


def test_a_truncated_tfrecord_is_used_up_to_the_damage(tmp_path, prepared, caplog):
    whole = tfrecord_of(examples())
    (tmp_path / "0.tfrecord").write_bytes(whole[:9])
    with pytest.raises(ValueError, match=r"0\.tfrecord: record 0 has 9 bytes of its"):
        reshard(TfRecords(str(tmp_path)), str(tmp_path / "out"))
    (tmp_path / "a.tfrecord").write_bytes(whole[:-30])
    found = open_source(reshard(TfRecords(str(tmp_path)), str(tmp_path / "out")))
    assert "0.tfrecord: record 0 has 9 bytes" in caplog.text
    assert len(found) == len(ROWS) - 1
    assert "a.tfrecord: record 16 should have" in caplog.text
    shutil.copytree(prepared, tmp_path / "set")
    (file,) = (tmp_path / "set").rglob("*.tfrecord*")
    data = file.read_bytes()
    file.write_bytes(data[: 16 + int.from_bytes(data[:8], "little")])
    source = Tfds("numbered", data_dir=str(tmp_path / "set"), caption="captions.text")
    assert len(open_source(reshard(source, str(tmp_path / "other")))) == 1
    assert "it should have 17 records or more" in caplog.text


def test_a_part_of_a_prepared_split(prepared, tmp_path):
    parts = []
    for split in ("train[:6]", "train[6:]"):
        source = Tfds("numbered", split, str(prepared), caption="captions.text")
        shards = reshard(source, str(tmp_path / split))
        parts.append(contents(open_source(shards)))
    assert [len(part) for part in parts] == [6, 11]
    assert len({image for part in parts for image, *_ in part}) == len(ROWS)


def test_a_little_gzip_does_not_fill_the_memory(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(in_order, "_LONGEST", 10_000)
    small = {"a.jpg": image(ROWS[11])[:0], "a.txt": b"x"}
    big = {**small, "b.jpg": bytes(20_000), "c.1": bytes(6_000), "c.2": bytes(6_000)}
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(tar_of(big)))
    header = tarfile.TarInfo("n")
    header.size, header.type = 1 << 30, tarfile.XHDTYPE
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(header.tobuf()))
    header.size, header.type = 5, tarfile.GNUTYPE_SPARSE
    (tmp_path / "2.tar.gz").write_bytes(gzip.compress(header.tobuf()))
    (tmp_path / "3.tfrecord.gz").write_bytes(gzip.compress(b"\xff\xff" + bytes(90_000)))
    with pytest.raises(ValueError, match=r"not one record .* can be used"):
        reshard(TarShards(str(tmp_path)), str(tmp_path / "out"))
    assert "0.tar.gz: b: it has 20000 bytes, more than the limit" in caplog.text
    assert "0.tar.gz: c: it has 12000 bytes" in caplog.text
    assert "1.tar.gz: a header of 1073741824 bytes is refused" in caplog.text
    assert "2.tar.gz: a header of 5 bytes is refused" in caplog.text
    with pytest.raises(ValueError, match="record 0 has 65535 bytes, more than"):
        reshard(TfRecords(f"{tmp_path}/*.tfrecord.gz"), str(tmp_path / "other"))


def test_shards_of_something_else_are_not_mixed_in(sources, tmp_path):
    reshard(sources["tar"], str(tmp_path / "out"), images=4)
    with pytest.raises(ValueError, match=r"out holds shards with images=4, and .*=5"):
        reshard(sources["tar"], str(tmp_path / "out"), images=5)
    with pytest.raises(ValueError, match=r"holds shards with source=TarShards"):
        reshard(sources["folder"], str(tmp_path / "out"), images=4)
    for name in ("x.tgz", "x.tar"):
        (tmp_path / name).write_bytes(tar_of({"no_suffix": b""}))
        with pytest.raises(ValueError, match=rf"already has {name}: name an empty"):
            reshard(sources["tar"], str(tmp_path))
    with pytest.raises(ValueError, match=r"x\.tar.* can be used: it has no samples"):
        reshard(TarShards(str(tmp_path / "x.tar")), str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="nothing can be written behind http"):
        reshard(sources["tar"], "https://localhost:1/out")
    with pytest.raises(ValueError, match=r"not one record .* no encoded image"):
        reshard(Synthetic(3), str(tmp_path / "drawn"))
    with pytest.raises(ValueError, match=r"no 'jpg' \(it has: caption, image, label\)"):
        reshard(dataclasses.replace(sources["tfrecord"], image="jpg"), str(tmp_path))


def test_both_ends_may_be_behind_a_url(sources, sample, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    remote = fsspec.filesystem("memory")
    remote.put(sources["tfds"].data_dir, "/prepared", recursive=True)
    prepared = dataclasses.replace(sources["tfds"], data_dir="memory://prepared")
    with pytest.raises(ValueError, match="--cache of navit reshard"):
        reshard(prepared, "memory://made/tfds")
    cache = LocalCache(tmp_path / "cache", 2**30)
    made = open_source(reshard(prepared, "memory://made/tfds", images=4, cache=cache))
    assert sorted(contents(made)) == sorted(sample)
    assert json.loads(remote.cat("/made/tfds/classes.json")) == CLASSES
    for file in Path(sources["tar.gz"].path).parent.glob("*.tar.gz"):
        remote.pipe(f"/given/{file.name}", file.read_bytes())
    for process, ends in (
        (1, pytest.raises(Unfinished)),
        (0, contextlib.nullcontext()),
    ):
        with ends:
            shards = reshard(
                TarShards("memory://given"),
                "memory://made/shards",
                images=4,
                share=Share(process=process, processes=2),
            )
    assert contents(open_source(shards)) == sample


def test_the_command_says_how_to_read_the_shards(
    sources, sample, tmp_path, capsys, caplog
):
    caplog.set_level(logging.INFO, logger="navit")
    out = str(tmp_path / "out")
    root = Path(sources["tar"].path).parent
    command = ["reshard", f"tfrecord:{root}/*.tfrecord", out, "caption=caption"]
    assert main([*command, "--images", "4", "--process", "0", "--processes", "2"]) == 0
    assert "process 0 of 2 is done" in capsys.readouterr().out
    assert main([*command, "--images", "4"]) == 0
    assert "17 images, 0 unreadable" in caplog.text
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"to read them: data.train=tars:{out}"
    assert contents(open_source(TarShards(out))) == sample
    for words, message in (
        (["reshard", str(SAMPLE), out], f"write KIND:PATH, such as folder:{SAMPLE}"),
        (["reshard", "tar:x", out], "did you mean 'tars'"),
        (["reshard", "tars:x", out, "captoin=y"], "did you mean 'caption'"),
        (["reshard", "tars:x.tar", out, "--process", "2"], "name both"),
        (["reshard", "memory://x.tar", out], "has no kind"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "change", "command"),
    [
        (
            "tar.gz",
            {"caption": "json.c"},
            r"navit reshard 'tars:.*gz' OUT caption=json.c",
        ),
        ("tfrecord", {"image": "jpg"}, r"navit reshard 'tfrecord:.*d' OUT image=jpg"),
        ("tfds", {}, r"tfds:numbered OUT data_dir=.* caption=captions.text"),
    ],
)
def test_a_config_that_names_them_gets_the_command(sources, kind, change, command):
    source = dataclasses.replace(sources[kind], **change)
    message = rf"has no random access: .*{command}`, and set data.train=tars:OUT"
    with pytest.raises(ValueError, match=message):
        open_source(source)
    if kind == "tfrecord":
        with pytest.raises(ValueError, match=message):
            open_source(ArrayRecords(source.path, source.image))
