"""navit.sources.tar: random access into shards equals the extracted files."""

import csv
import io
import json
import logging
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import read_image

from navit.config import Folder, TarShards
from navit.sources import index as sizes
from navit.sources.folder import FolderSource
from navit.sources.images import standard
from navit.sources.kinds import open_source
from navit.sources.source import Source

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
CLASSES = sorted({row["label"] for row in ROWS})


@pytest.fixture(autouse=True)
def kept_by_all(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_tar(path: Path, members: dict[str, bytes], format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample_members(rows=ROWS) -> dict[str, bytes]:
    members = {}
    for row in rows:
        key, _, _ = row["file"].rpartition(".")
        fields = {"caption": [row["caption"], "two"], "meta": {"title": "T " + key}}
        members[row["file"]] = (SAMPLE / row["file"]).read_bytes()
        members[f"{key}.txt"] = row["caption"].encode()
        members[f"{key}.json"] = json.dumps(fields).encode()
        members[f"{key}.cls"] = str(CLASSES.index(row["label"])).encode()
    return members


@pytest.fixture
def shards(tmp_path) -> Path:
    """The sample in three shards."""
    for i in range(3):
        write_tar(tmp_path / "set" / f"{i:05d}.tar", sample_members(ROWS[i::3]))
    return tmp_path / "set"


@pytest.fixture
def photos(tmp_path) -> Path:
    """A copy: an index is kept beside the data."""
    return shutil.copytree(SAMPLE, tmp_path / "photos")


def opened(path, **options) -> Source:
    return open_source(TarShards(path=str(path), **options))


def keys(source: Source) -> list[str]:
    return [source.name(i).rpartition(" ")[2] for i in range(len(source))]


@pytest.mark.parametrize(
    "pattern", ["", "/{00000..00002}.tar", "/*.tar", "/{00000,00002,00001}.tar"]
)
def test_access_equals_the_files_and_their_table(shards, photos, pattern):
    source = opened(f"{shards}{pattern}")
    folder = FolderSource(Folder(str(photos)))
    place = {Path(folder.name(i)).stem: i for i in range(len(folder))}
    assert sorted(keys(source)) == sorted(place)
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        j = place[keys(source)[i]]
        assert read_image(source, i) == read_image(folder, j)
        assert source.record(i).captions == folder.record(j).captions
        assert source.sizes[i].tolist() == folder.sizes[j].tolist()
        task, other = source.tasks["label"], folder.tasks["label"]
        label = CLASSES[int(task.class_names[task.labels[i]])]
        assert label == other.class_names[other.labels[j]]


def test_wildcards_in_a_real_file_name_are_literal(tmp_path):
    for name in ("a[1]/b{1,2}.tar", "a[1]/*.tar"):
        write_tar(tmp_path / name, sample_members(ROWS[:2]))
    assert len(opened(tmp_path / "a[1]/b{1,2}.tar")) == 2
    assert len(opened(tmp_path / "a[1]/*.tar")) == 2
    assert len(opened(tmp_path / "a[1]")) == 4


def test_a_folder_that_a_glob_matches_is_no_file(tmp_path):
    (tmp_path / "b.tar").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.tar or .* file matches .*\*"):
        opened(tmp_path / "*.tar")
    write_tar(tmp_path / "a.tar", sample_members(ROWS[:2]))
    assert len(opened(tmp_path / "*.tar")) == 2


def test_a_member_of_negative_size_does_not_hang_the_index(tmp_path, caplog):
    path = tmp_path / "a.tar"
    write_tar(path, sample_members(ROWS[:2]))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4]
    data = bytearray(path.read_bytes())
    header = data[third.offset : third.offset + 512]
    size = third.offset_data - third.offset
    header[124:136] = b"\xff" + (-size).to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[third.offset : third.offset + 512] = header
    path.write_bytes(data)
    assert len(opened(path)) == 1
    assert "has a negative size" in caplog.text


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_tar_format_and_long_or_odd_names(tmp_path, format):
    image = (SAMPLE / "coin_small.jpg").read_bytes()
    names = ["a/b.c/x", "d" * 90, "é", "../../up", "/outside/x"]
    if format != tarfile.USTAR_FORMAT:
        names.append("long/" * 40 + "x")
    members = {}
    for i, name in enumerate(names):
        members |= {
            f"{name}.JPG": image,
            f"{name}.seg.png": b"x",
            f"{name}.txt": b"c%d" % i,
        }
    write_tar(tmp_path / "a.tar", members, format)
    source = opened(tmp_path / "a.tar")
    assert len(source) == len(names)
    assert [source.record(i).captions for i in range(len(names))] == [
        (f"c{i}",) for i in range(len(names))
    ]
    assert all(read_image(source, i) == image for i in range(len(names)))
    assert not (tmp_path.parent / "up.JPG").exists()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", (ROWS[0]["caption"],)),
        ("txt", (ROWS[0]["caption"],)),
        ("json.caption", (ROWS[0]["caption"], "two")),
        ("json.meta.title", ("T astronaut",)),
    ],
)
def test_captions_are_a_member_or_a_field_of_the_json(shards, caption, expected):
    source = opened(shards, caption=caption)
    assert source.record(keys(source).index("astronaut")).captions == expected


def test_only_a_json_or_only_a_class_is_enough(tmp_path):
    image = (SAMPLE / "coin_small.jpg").read_bytes()
    write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": image,
            "0.json": b'{"caption": "said"}',
            "1.jpg": image,
            "1.cls": b"1\n",
            "2.jpg": image,
            "2.json": b'{"url": "no caption"}',
            "3.txt": b"no image",
            "4.jpg": image,
            "4.json": b"{",
            "5.jpg": b"no image",
            "5.txt": b"text",
            "6.jpg": image,
            "6.txt": b"\xff\xfe",
        },
    )
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    source = opened(tmp_path, classes=str(tmp_path / "names.txt"))
    assert [source.record(i).captions for i in range(len(source))] == [
        ("said",),
        ("dog",),
    ]
    assert source.tasks["label"].labels.tolist() == [-1, 1]
    assert source.left_out == 4
    (listed,) = (tmp_path / ".navit").glob("unreadable*")
    assert [line.split(": ")[1] for line in listed.read_text().splitlines()] == list(
        "2456"
    )
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"the label 1 has no name among 1: .*classes"):
        opened(tmp_path, classes=str(tmp_path / "names.txt"))


@pytest.mark.parametrize("cut", [100, 512, 700, 5_000, 60_000, -1024, -1025, -100_000])
def test_the_whole_samples_of_a_truncated_shard_are_used(shards, caplog, cut):
    whole = opened(shards)
    images = {key: read_image(whole, i) for i, key in enumerate(keys(whole))}
    path = shards / "00001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {m.name: m.offset_data + m.size for m in tar}
    # The end is padded to 10 KiB; count from the last member's.
    end = -(-max(ends.values()) // 512) * 512
    cut = cut if cut > 0 else end + cut + 1024
    path.write_bytes(data[:cut])
    source = opened(shards)
    lost = {
        Path(row["file"]).stem
        for row in ROWS[1::3]
        if ends[row["file"]] > cut or ends[Path(row["file"]).stem + ".txt"] > cut
    }
    assert set(keys(source)) >= set(images) - lost
    assert all(
        read_image(source, i) == images[key] for i, key in enumerate(keys(source))
    )
    assert "damaged" in caplog.text and "00001.tar" in caplog.text
    assert source.damaged == 1
    if "cut off" in caplog.text:  # else within the header of a member
        count = sum("00001.tar" in source.name(i) for i in range(len(source)))
        assert f"00001.tar: cut off at byte {cut}" in caplog.text
        assert f"its {count} whole samples are used" in caplog.text


def test_a_shard_that_is_no_tar_is_named_and_the_others_are_used(shards, caplog):
    (shards / "00000.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    (shards / "00003.tar").write_bytes(b"text" * 1000)
    (shards / "00004.tar").write_bytes(b"")
    source = opened(shards)
    assert len(source) == sum(len(ROWS[i::3]) for i in (1, 2))
    assert source.damaged == 3
    assert "00000.tar: compressed" in caplog.text
    assert "00003.tar" in caplog.text and "00004.tar" in caplog.text
    for shard in ("00001", "00002"):
        (shards / f"{shard}.tar").unlink()
    with pytest.raises(ValueError, match="have no image"):
        opened(shards)


def test_shards_are_scanned_once_and_again_when_one_changes(shards, monkeypatch):
    first = opened(shards)
    monkeypatch.setattr(tarfile, "open", None)
    assert opened(shards).fingerprint() == first.fingerprint()
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    write_tar(shards / "00001.tar", sample_members(ROWS[:2]))
    changed = opened(shards)
    assert changed.fingerprint() != first.fingerprint()
    assert "cameraman" in keys(changed)


def test_a_pickled_source_reads_in_another_process(shards):
    source = opened(shards)
    expected = read_image(source, 3)
    copy = pickle.loads(pickle.dumps(source))
    assert (
        read_image(copy, 3) == expected
        and copy.record(3).captions == source.record(3).captions
    )


def test_more_shards_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr("navit.sources.storage._OPEN_FILES", 3)
    for i in range(12):
        write_tar(tmp_path / f"{i}.tar", sample_members(ROWS[i : i + 1]))
    source = opened(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(len(source)):
        assert read_image(source, i)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "no path"),
        ("{root}/nowhere", "nowhere"),
        ("{root}/{{00000..00003}}.tar", "00003.tar"),
        ("{root}/{{3..1}}.tar", "counts down"),
        ("{root}/x*.tar", "matches"),
        ("gss://bucket/x.tar", "'gss://bucket/x.tar' cannot be opened"),
    ],
)
def test_a_path_without_shards_is_named(shards, path, words):
    with pytest.raises((FileNotFoundError, ValueError), match=words) as caught:
        opened(path.format(root=shards))
    assert "\n" not in str(caught.value)


def test_shards_that_a_pattern_names_may_be_missing_up_to_a_share(shards, caplog):
    pattern = f"{shards}/{{00000..00009}}.tar"
    with pytest.raises(ValueError, match=r"7 of 10 files .* are missing: .*00003") as e:
        opened(pattern, missing=0.5)
    assert "set missing=0.7 " in str(e.value) and "it is 0.5" in str(e.value)
    source = opened(pattern, missing=0.7)
    assert keys(source) == keys(opened(shards))
    assert "7 of 10 files" in caplog.text
    with pytest.raises(FileNotFoundError, match="no file"):
        opened(f"{shards}/{{00005..00009}}.tar", missing=1.0)


def test_a_typo_in_a_field_lists_the_fields(shards):
    with pytest.raises(ValueError, match=r"'captoin' \(it has: caption, meta\)"):
        opened(shards, caption="json.captoin")
    with pytest.raises(ValueError, match="which field"):
        opened(shards, caption="json")


@pytest.fixture
def memory():
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_shards_and_folders_behind_a_url(shards, photos, memory, caplog):
    memory.put(str(shards), "/bucket/set", recursive=True)
    caplog.set_level(logging.INFO, "navit")
    local = opened(shards)
    for path in ("memory://bucket/set/{00000..00002}.tar", "memory://bucket/set"):
        remote = opened(path)
        assert remote.fingerprint() == local.fingerprint()
        assert read_image(remote, 4) == read_image(local, 4)
        assert remote.record(4).captions == local.record(4).captions
    memory.put(str(photos), "/bucket/photos", recursive=True)
    folder = FolderSource(Folder(str(photos)))
    for path in ("memory://bucket/photos", "memory://bucket/photos/"):
        remote = FolderSource(Folder(path))
        assert remote.fingerprint() == folder.fingerprint()
        assert read_image(remote, 2) == read_image(folder, 2)
    assert FolderSource(Folder(path, table="captions.csv")).sizes.any()
    for wrong in (
        {"path": "memory://bucket/nothing"},
        {"path": path, "table": "x.csv"},
    ):
        with pytest.raises(FileNotFoundError):
            FolderSource(Folder(**wrong))
    with pytest.raises(FileNotFoundError):
        opened("memory://bucket/set/00009.tar")


class Status(Exception):
    """An HTTP error like aiohttp's, which is not an OSError."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='...'")
        self.status = status


@pytest.fixture
def server(memory, shards, monkeypatch):
    """The shards behind memory://, whose reads raise what is in the returned list."""
    memory.put(str(shards), "/bucket/set", recursive=True)
    errors: list[Exception | None] = []
    read = type(memory).cat_file

    def cat_file(self, path, **options):
        if errors and (error := errors.pop(0)):
            raise error
        return read(self, path, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    return errors


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that only waiting moves, as [seconds]."""
    now = [1.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("navit.sources.transient.time.sleep", sleep)
    monkeypatch.setattr("navit.sources.transient.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    "error", [Status(503), Status(429), ConnectionResetError(), TimeoutError()]
)
def test_a_passing_error_is_tried_again(shards, server, clock, error):
    server += [error] * 3
    source = opened("memory://bucket/set")
    assert source.fingerprint() == opened(shards).fingerprint()
    server += [error] * 4
    assert read_image(source, 4) == read_image(opened(shards), 4)
    assert not server


@pytest.mark.parametrize(
    ("error", "raised"),
    [(Status(403), OSError), (FileNotFoundError("404"), FileNotFoundError)],
)
def test_an_error_that_stays_is_not_tried_again(server, clock, error, raised):
    source = opened("memory://bucket/set")
    server += [error, None]
    with pytest.raises(raised, match=r"40[34]"):
        read_image(source, 4)
    assert server == [None] and clock == [1.0]


def test_an_error_that_does_not_pass_ends_within_a_minute(server, clock):
    source = opened("memory://bucket/set")
    server += [Status(503)] * 5
    with pytest.raises(OSError, match=r"bucket/set/\d+\.tar: 503"):
        read_image(source, 4)
    assert not server and clock[0] < 20
    # If nothing succeeds at all, the waits of all reads together are bounded.
    server += [Status(503)] * 1000
    for _ in range(200):
        with pytest.raises(OSError):
            read_image(source, 4)
    assert clock[0] < 90
    server.clear()
    assert read_image(source, 4)


def test_indexing_stops_at_a_passing_error_and_blames_no_image(server, clock, tmp_path):
    good = [None] * 2  # of three shards
    server += [*good, *[Status(503)] * 1000]
    with pytest.raises(ConnectionError, match="503"):
        opened("memory://bucket/set")
    server.clear()
    assert len(opened("memory://bucket/set")) == len(ROWS)
    assert not list(tmp_path.rglob("unreadable*"))


def test_an_object_that_always_fails_is_left_out_of_the_index(
    photos, memory, monkeypatch, clock, caplog
):
    memory.put(str(photos), "/bucket/photos", recursive=True)
    read, asked = type(memory).cat_file, []

    def cat_file(self, path, **options):
        asked.append(path)
        if "astronaut" in path:
            raise Status(503)
        return read(self, path, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    source = FolderSource(Folder("memory://bucket/photos"))
    whole = FolderSource(Folder(str(photos)))
    assert (len(source), source.left_out) == (len(whole) - 1, 1)
    assert re.search(r"unreadable: .*/astronaut.jpg: .*503", caplog.text)


def test_an_image_is_fetched_only_if_it_is_used(photos, shards, memory, monkeypatch):
    memory.put(str(photos), "/bucket/photos", recursive=True)
    memory.put(str(shards), "/bucket/set", recursive=True)
    folder = FolderSource(Folder("memory://bucket/photos"))
    tar = opened("memory://bucket/set")
    read, asked = type(memory).cat_file, []

    def cat_file(self, path, start=0, end=None):
        asked.append(end - start)
        return read(self, path, start=start, end=end)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    record = folder.record(2)
    assert record.captions and not asked
    image = standard(record.image)
    assert asked == [len(image)]
    asked.clear()
    record = tar.record(2)
    assert record.captions and max(asked) < 1000
    asked.clear()
    image = standard(record.image)
    assert asked == [len(image)]


def test_a_listing_without_sizes_is_completed(photos, memory, monkeypatch):
    memory.put(str(photos), "/bucket/photos", recursive=True)
    find = type(memory).find

    def find_names(self, path, **options):
        return {name: {"size": None} for name in find(self, path)}

    monkeypatch.setattr(type(memory), "find", find_names)
    folder = FolderSource(Folder("memory://bucket/photos"))
    assert folder.fingerprint() == FolderSource(Folder(str(photos))).fingerprint()


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="nosuch"):
        opened("nosuch://bucket/a.tar")
