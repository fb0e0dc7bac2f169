"""Sources of records: ArrayRecord, Parquet, mixtures, and what they have in common."""

import csv
import io
import itertools
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from helpers import read_image, serialize_example
from PIL import Image

from navit import config
from navit.config import ArrayRecords, Folder, Mixture, ParquetImages, Synthetic
from navit.sources import examples, records
from navit.sources import index as sizes
from navit.sources.kinds import open_source
from navit.sources.names import class_names
from navit.sources.source import Source

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
CLASSES = sorted({row["label"] for row in ROWS})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image_of(row: dict) -> bytes:
    return (SAMPLE / row["file"]).read_bytes()


def assert_is_the_sample(source: Source, rows=ROWS, several=False) -> None:
    folder = open_source(Folder(str(SAMPLE)))
    place = {Path(folder.name(i)).name: i for i in range(len(folder))}
    assert len(source) == len(rows)
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        j = place[rows[i]["file"]]
        assert read_image(source, i) == image_of(rows[i])
        expected = (rows[i]["caption"], "second") if several else (rows[i]["caption"],)
        assert source.record(i).captions == expected
        assert source.sizes[i].tolist() == folder.sizes[j].tolist()
        task = source.tasks["label"]
        assert task.class_names[task.labels[i]] == rows[i]["label"]


def write_records(path: Path, payloads: list[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    return str(path)


def example(row: dict, **features) -> bytes:
    return serialize_example(
        {"image": image_of(row), "caption": [row["caption"], "second"], **features}
    )


# Examples: the wire format


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(name: bytes, kind: int, payload: bytes) -> bytes:
    return field(1, field(1, name) + field(2, field(kind, payload)))


def test_an_example_is_read_as_the_wire_format_defines():
    floats = field(1, struct.pack("<2f", 0.5, -2.0))
    integers = field(1, varint(7) + varint((1 << 64) - 1))
    data = field(
        1,
        feature(b"image", 1, field(1, b"\xff\xd8") + field(1, b""))
        + feature(b"ratio", 2, floats)
        + feature(b"label", 3, integers)
        + feature("é".encode(), 3, b""),
    )
    assert examples.parse(data) == {
        "image": [b"\xff\xd8", b""],
        "ratio": [0.5, -2.0],
        "label": [7, -1],
        "é": [],
    }
    written = {"image": [b"\xff\xd8", b""], "ratio": [0.5, -2.0], "label": [7, -1]}
    assert examples.parse(serialize_example(written)) == written


@pytest.mark.parametrize(
    "data", [b"", b"text, not a message", pickle.dumps({"image": b"x"}), b"\x80" * 50]
)
def test_data_that_is_not_an_example_is_refused(data):
    with pytest.raises(ValueError, match="not a tf"):
        examples.parse(data)


def test_our_examples_are_those_of_tfds():
    code = (
        "import sys; from navit.sources import examples;"
        "from tensorflow_datasets.proto import tf_example_pb2 as p;"
        "e = p.Example(); f = e.features.feature;"
        "f['a'].bytes_list.value.append(b'x'); f['b'].int64_list.value.extend([1, -5]);"
        "f['c'].float_list.value.append(0.25);"
        "d = e.SerializeToString();"
        "assert examples.parse(d) == {'a': [b'x'], 'b': [1, -5], 'c': [0.25]};"
        "ours = examples.example_message().FromString(d).SerializeToString();"
        "assert p.Example.FromString(ours) == e;"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ArrayRecord


@pytest.fixture
def array_records(tmp_path) -> Path:
    """The sample in two files."""
    (tmp_path / "records").mkdir()
    for i, rows in enumerate((ROWS[:9], ROWS[9:])):
        payloads = [example(r, label=CLASSES.index(r["label"])) for r in rows]
        write_records(tmp_path / f"records/{i}.array_record", payloads)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path / "records"


@pytest.mark.parametrize("pattern", ["", "/*", "/{0,1}.array_record"])
def test_array_records_equal_the_files_and_their_table(array_records, pattern):
    names = str(array_records.parent / "classes.txt")
    source = open_source(ArrayRecords(f"{array_records}{pattern}", classes=names))
    assert_is_the_sample(source, several=True)
    copy = pickle.loads(pickle.dumps(source))
    assert read_image(copy, 12) == read_image(source, 12)


def test_files_as_tfds_names_them(tmp_path):
    paths = [tmp_path / f"a-train.array_record-0000{i}-of-00002" for i in range(2)]
    for i, path in enumerate(paths):
        write_records(path, [example(row) for row in ROWS[i : i + 1]])
    for path, count in ((tmp_path, 2), (tmp_path / "a-train*", 2), (paths[0], 1)):
        assert len(open_source(ArrayRecords(str(path)))) == count


def test_labels_in_words_and_none_at_all(tmp_path):
    rows = ROWS[:4]
    path = tmp_path / "a.array_record"
    write_records(path, [example(r, label=r["label"].encode()) for r in rows])
    source = open_source(ArrayRecords(str(path)))
    assert_is_the_sample(source, rows, several=True)
    write_records(path, [example(row) for row in rows])
    assert open_source(ArrayRecords(str(path))).tasks == {}
    assert open_source(ArrayRecords(str(path), label="")).tasks == {}


def test_a_record_without_what_it_needs_is_left_out_and_counted(tmp_path, caplog):
    good = example(ROWS[0])
    payloads = [
        good,
        serialize_example({"image": image_of(ROWS[1])}),  # no caption, no label
        serialize_example({"image": b"no image", "caption": "x"}),
        serialize_example({"image": 5, "caption": "x"}),
        b"garbage",
        good,
    ]
    path = write_records(tmp_path / "a.array_record", payloads)
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example.*must be"):
        open_source(ArrayRecords(path))
    payloads[2:2] = [good] * 20  # beyond the records that are looked at first
    payloads[1], payloads[-3] = good, payloads[1]
    path = write_records(tmp_path / "a.array_record", payloads)
    source = open_source(ArrayRecords(path))
    assert (len(source), source.left_out) == (23, 3)
    assert all(read_image(source, i) == image_of(ROWS[0]) for i in range(23))
    assert "record 24: not a tf.train.Example" in caplog.text


def test_a_damaged_file_is_named_and_the_others_are_used(array_records, caplog):
    (array_records / "2.array_record").write_bytes(b"text")
    source = open_source(ArrayRecords(str(array_records)))
    assert len(source) == 17
    assert "2.array_record" in caplog.text
    for i in range(2):
        (array_records / f"{i}.array_record").unlink()
    with pytest.raises(ValueError, match=r"not one of 1 files.*2\.array_record"):
        open_source(ArrayRecords(str(array_records)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "img"}, r"no 'img' \(it has: caption, image, label\)"),
        ({"caption": "captoin"}, r"no 'captoin' \(it has: caption, image, label\)"),
        ({"label": "class"}, r"no 'class' \(it has: caption, image, label\)"),
        (
            {"path": "no_label", "label": "label"},
            r"no 'label' \(it has: caption, image",
        ),
        ({"caption": "", "label": ""}, "neither a caption nor a label"),
        ({"path": "/nowhere/a.array_record"}, "/nowhere/a.array_record"),
    ],
)
def test_a_field_that_is_asked_for_and_not_there_is_refused(
    array_records, options, words, monkeypatch
):
    monkeypatch.chdir(array_records)
    write_records(array_records / "no_label", [example(ROWS[0])])
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_source(ArrayRecords(**{"path": str(array_records), **options}))


# Parquet


def parquet_table(rows=ROWS, struct_=True, labels=None) -> pa.Table:
    images = [image_of(row) for row in rows]
    columns = {
        "image": [
            {"bytes": b, "path": r["file"]} for b, r in zip(images, rows, strict=True)
        ]
        if struct_
        else images,
        "caption": [row["caption"] for row in rows],
        "label": labels or [CLASSES.index(row["label"]) for row in rows],
    }
    table = pa.table(columns)
    names = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(names)})


@pytest.mark.parametrize("struct_", [True, False])
@pytest.mark.parametrize("group", [1, 4, 100])
def test_rows_that_hold_images_equal_the_files(tmp_path, struct_, group):
    for i, rows in enumerate((ROWS[:10], ROWS[10:])):
        file = tmp_path / f"{i}.parquet"
        pa.parquet.write_table(parquet_table(rows, struct_), file, row_group_size=group)
    source = open_source(ParquetImages(str(tmp_path)))
    assert_is_the_sample(source)
    copy = pickle.loads(pickle.dumps(source))
    assert read_image(copy, 12) == read_image(source, 12)


def test_parquet_behind_a_url_equals_local(tmp_path):
    remote = fsspec.filesystem("memory")
    for i, rows in enumerate((ROWS[:10], ROWS[10:])):
        file = tmp_path / f"{i}.parquet"
        pa.parquet.write_table(parquet_table(rows), file, row_group_size=4)
        remote.pipe(f"/parquet/{i}.parquet", file.read_bytes())
    local = open_source(ParquetImages(str(tmp_path)))
    for path in ("memory://parquet", "memory://parquet/{0..1}.parquet"):
        source = open_source(ParquetImages(path))
        assert_is_the_sample(source)
        assert source.fingerprint() == local.fingerprint()
    copy = pickle.loads(pickle.dumps(source))
    assert read_image(copy, 12) == read_image(local, 12)
    remote.pipe("/broken/a.parquet", b"PAR1 no")
    with pytest.raises(ValueError, match="not one of 1 files is readable Parquet"):
        open_source(ParquetImages("memory://broken"))


def test_an_outage_stops_the_indexing_of_parquet_and_blames_no_image(
    tmp_path, monkeypatch
):
    """The row groups in memory do not show that there is a connection."""
    monkeypatch.setattr("navit.sources.transient.time.sleep", lambda seconds: None)
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    table = pa.table({"image": [file.getvalue()] * 400, "caption": ["a dot"] * 400})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    remote = fsspec.filesystem("memory")
    read = type(remote).cat_file

    def cat_file(self, path, **options):
        if next(reads) >= 0:
            raise TimeoutError("no answer")
        return read(self, path, **options)

    monkeypatch.setattr(type(remote), "cat_file", cat_file)
    stops = 0
    for before in itertools.count(1):
        path = f"outage{before}/a.parquet"
        remote.pipe(f"/{path}", (tmp_path / "a.parquet").read_bytes())
        reads = itertools.count(-before)
        try:
            open_source(ParquetImages(f"memory://{path}"))
        except ConnectionError:
            stops += 1
        finished = next(reads) <= 0
        assert not list(tmp_path.rglob("unreadable*"))
        reads = itertools.count(-1000)
        assert len(open_source(ParquetImages(f"memory://{path}"))) == 400
        if finished:
            break
    assert stops == before - 1 >= 10  # every row group is read


def test_a_row_group_is_read_once_for_its_neighbours(tmp_path, monkeypatch):
    pa.parquet.write_table(parquet_table(), tmp_path / "a.parquet", row_group_size=4)
    source = open_source(ParquetImages(str(tmp_path)))
    read = []
    real = pa.parquet.ParquetFile.read_row_group

    def counted(self, number, *args, **kwargs):
        read.append(number)
        return real(self, number, *args, **kwargs)

    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_group", counted)
    source = open_source(ParquetImages(str(tmp_path)))
    assert sorted(set(read)) == list(range(5)) and len(read) <= 10
    read.clear()
    for i in range(4):
        read_image(source, i), source.record(i).captions
    assert len(read) <= 1


def test_a_table_in_parquet(tmp_path):
    table = pa.table(
        {k: [row[k] for row in ROWS] for k in ("file", "caption", "label")}
    )
    for row in ROWS:
        (tmp_path / row["file"]).write_bytes(image_of(row))
    pa.parquet.write_table(table, tmp_path / "table.parquet")
    assert_is_the_sample(open_source(Folder(str(tmp_path))))
    pa.parquet.write_table(parquet_table(), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"no 'file' \(it has: image.*ParquetImages"):
        open_source(Folder(str(tmp_path)))


def test_rows_without_bytes_and_damaged_files_are_counted(tmp_path, caplog):
    rows = [{"bytes": None, "path": "0.jpg"}, {"bytes": image_of(ROWS[0]), "path": ""}]
    table = pa.table({"image": rows, "text": ["a", "b"]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    source = open_source(ParquetImages(str(tmp_path), caption="text"))
    assert (len(source), source.left_out) == (1, 1)
    assert source.record(0).captions == ("b",) and "b.parquet" in caplog.text
    with pytest.raises(ValueError, match=r"'title' \(it has: image, text\)"):
        open_source(ParquetImages(str(tmp_path), caption="title"))


def test_large_row_groups_are_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("navit.sources.parquet._LARGE_GROUP", 1000)
    pa.parquet.write_table(parquet_table(), tmp_path / "a.parquet")
    open_source(ParquetImages(str(tmp_path)))
    assert "row groups" in caplog.text and "row_group_size" in caplog.text


def test_parquet_files_of_other_columns_are_refused_by_name(tmp_path):
    table = parquet_table()
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    names = ["words" if name == "caption" else name for name in table.column_names]
    pa.parquet.write_table(table.rename_columns(names), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has the columns .*words"):
        open_source(ParquetImages(str(tmp_path)))


def test_an_image_with_its_caption_is_one_read(tmp_path, monkeypatch):
    pa.parquet.write_table(parquet_table(), tmp_path / "a.parquet")
    source = open_source(ParquetImages(str(tmp_path)))
    reader, asked = source._reader, []
    real = reader._raw

    def raw(table, row):
        asked.append(row)
        return real(table, row)

    monkeypatch.setattr(reader, "_raw", raw)
    for i in range(len(source)):
        assert all(source.record(i))
    assert asked == list(range(len(source)))


# What they have in common


def test_labels_are_integers_or_words():
    assert [records.label_text(v) for v in (3, [3], b"3", "3", np.int64(3))] == [
        "3"
    ] * 5
    assert [records.label_text(v) for v in (None, [], -1, "", "-1")] == [""] * 5
    for wrong in (1.5, [1, 2], [0.5, 10**400], {"a": 1}, True):
        with pytest.raises(ValueError, match="label"):
            records.label_text(wrong)


def test_a_label_as_long_as_a_book_is_refused():
    assert records.label_text("a" * 1000) == "a" * 1000
    with pytest.raises(ValueError, match=r"20000 characters .*is it a caption"):
        records.label_text("a" * 20_000)


def test_names_of_classes_are_a_line_each(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("a\u2028b\r\nc \n\n".encode())
    assert class_names(str(file)) == ("a\u2028b", "c")
    file.write_text("a\n\nc\n")
    with pytest.raises(ValueError, match=r"names.txt: name 2 is empty"):
        class_names(str(file))
    file.with_suffix(".json").write_text('["a", " ", "c"]')
    with pytest.raises(ValueError, match=r"names.json: name 2 is empty"):
        class_names(str(file.with_suffix(".json")))


def test_a_parquet_file_of_no_rows_is_refused(tmp_path):
    pyarrow.parquet.write_table(parquet_table().slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no records"):
        open_source(ParquetImages(str(tmp_path)))


def test_captions_are_text_one_or_several():
    assert records.texts([b"a", " b\n", "", "c"]) == ("a", "b", "c")
    assert records.texts(np.array([b"a"], object)) == ("a",)
    assert records.texts(None) == records.texts("") == ()
    for wrong in (3, [None], {"en": "x"}, b"\xff"):
        with pytest.raises(ValueError):
            records.texts(wrong)


def test_a_label_beyond_its_names_is_an_error(tmp_path):
    path = write_records(tmp_path / "a.array_record", [example(ROWS[0], label=2**40)])
    with pytest.raises(ValueError, match=f"label {2**40} has no name"):
        open_source(ArrayRecords(path))


def test_an_index_is_kept_for_records_too(array_records, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    first = open_source(ArrayRecords(str(array_records)))
    monkeypatch.setattr(sizes.Entry, "of", None)
    again = open_source(ArrayRecords(str(array_records)))
    assert again.fingerprint() == first.fingerprint()
    np.testing.assert_array_equal(again.sizes, first.sizes)


# Mixtures


def test_a_mixture_holds_every_image_of_every_source(array_records):
    names = str(array_records.parent / "classes.txt")
    parts = (
        Folder(str(SAMPLE)),
        Synthetic(size=5),
        ArrayRecords(str(array_records), classes=names),
    )
    mixture = open_source(Mixture(parts, (1.0, 1.0, 2.0)))
    singles = [open_source(part) for part in parts]
    assert isinstance(mixture, Source)
    assert len(mixture) == 39 == len(mixture.sizes)
    assert mixture.shares == [0.25, 0.25, 0.5]
    assert mixture.counts == [len(single) for single in singles]
    offsets = np.cumsum([0, *mixture.counts])
    for offset, single in zip(offsets[:-1], singles, strict=True):
        for i in range(len(single)):
            index = int(offset) + i
            assert mixture.name(index) == single.name(i)
            assert mixture.record(index).captions == single.record(i).captions
            assert mixture.sizes[index].tolist() == single.sizes[i].tolist()
            np.testing.assert_array_equal(
                read_image(mixture, index), read_image(single, i)
            )
    label = mixture.tasks["label"]
    assert label.class_names == tuple(CLASSES)
    assert (label.labels[17:22] == -1).all() and (label.labels[22:] >= 0).all()
    assert (mixture.tasks["coarse"].labels[17:22] >= 0).all()
    for outside in (-1, 39):
        with pytest.raises(IndexError):
            read_image(mixture, outside)
    other = open_source(Mixture(parts, (1.0, 1.0, 1.0)))
    assert other.fingerprint() != mixture.fingerprint()
    assert (
        pickle.loads(pickle.dumps(mixture)).record(38).captions
        == mixture.record(38).captions
    )


def test_without_weights_every_image_counts_alike():
    mixture = open_source(Mixture((Synthetic(size=30), Synthetic(size=10, seed=1))))
    assert mixture.shares == [0.75, 0.25]


def test_a_mixture_has_no_task_whose_classes_differ(array_records, caplog):
    parts = (Folder(str(SAMPLE)), ArrayRecords(str(array_records)))
    assert open_source(Mixture(parts)).tasks == {}
    assert "'label'" in caplog.text


@pytest.mark.parametrize(
    ("sources", "weights", "words"),
    [
        ((), (), "needs sources"),
        ((Synthetic(),), (1.0, 2.0), "1 sources need one weight each, not 2"),
        ((Synthetic(),), (0.0,), "positive"),
        ((Synthetic(),), (float("nan"),), "positive"),
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(sources, weights, words):
    with pytest.raises(ValueError, match=words):
        Mixture(sources, weights)


def test_weights_are_set_by_whole_numbers_too():
    train = Mixture((Synthetic(3), Synthetic(4)))
    whole = config.Config(data=config.DataConfig(train=train))
    changed = config.override(whole, ["data.train.weights=1,2.5"])
    assert changed.data.train.weights == (1.0, 2.5)
    assert type(changed.data.train.weights[0]) is float


@pytest.mark.parametrize(
    "source",
    [
        Mixture((Folder("a"), config.TarShards("b"), Synthetic(3)), (1.0, 2.0, 0.5)),
        config.Tfds("coco_captions", caption="captions.text"),
        ParquetImages("x", label=""),
        ArrayRecords("x"),
    ],
)
def test_a_source_goes_through_json_and_back(source):
    whole = config.Config(data=config.DataConfig(train=source, eval=source))
    assert config.from_json(json.loads(json.dumps(config.to_json(whole)))) == whole
