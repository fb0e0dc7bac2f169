"""navit.sources.index: one pass over the headers, saved, resumed, built again."""

import dataclasses
import errno
import io
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from navit.cli import main
from navit.config import Folder
from navit.sources import cache, folder, storage
from navit.sources import index as sizes
from navit.sources.folder import FolderSource
from navit.sources.images import size_of
from navit.sources.index_join import Index
from navit.sources.index_part import Entry, State
from navit.sources.kinds import Opener

SAMPLE = Path(__file__).parents[2] / "data" / "sample"


def encoded(width: int, height: int, format: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (width, height), (90, 40, 10))
    image.save(file, format, **options)
    return file.getvalue()


IMAGES = [encoded(8 + i, 20) for i in range(30)]


def inspect(i: int) -> Entry:
    return Entry.of(IMAGES[i], f"l{i % 3}", (f"caption {i}",))


def bad_inspect(i: int) -> Entry:
    """Every seventh is none."""
    if i % 7 == 3:
        raise ValueError("no\nimage")
    return inspect(i)


@pytest.fixture
def place(tmp_path, monkeypatch) -> cache.Place:
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    return cache.Place(folder, "the set", "of today")


AGAIN = sizes.Share(again=True)


def measure(place, inspect=inspect, count=30, **options) -> Index:
    return sizes.measure(inspect, "image {}".format, count, place, **options)


def assert_same(one: Index, other: Index) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_equal(a, b)


def test_an_index_holds_the_sizes_labels_and_what_is_unreadable(place):
    index = measure(place, bad_inspect)
    usable = [i for i in range(len(IMAGES)) if i % 7 != 3]
    assert index.unreadable == {i: "no image" for i in range(3, 30, 7)}
    assert index.records(np.arange(len(usable))).tolist() == usable
    assert index.sizes.tolist() == [[20, 8 + i] for i in usable]
    words = index.words[index.labels].tolist()
    assert words == [f"l{i % 3}".encode() for i in usable]
    (listed,) = (place.folder / ".navit").glob("unreadable-*.txt")
    lines = listed.read_text().splitlines()
    assert lines == [f"image {i}: no image" for i in index.unreadable]


def test_a_kept_index_is_read_and_nothing_else(place):
    first = measure(place, bad_inspect)

    def never(i):
        raise AssertionError("read again")

    assert_same(measure(place, never), first)
    with pytest.raises(AssertionError):
        measure(place, never, share=AGAIN)


@pytest.mark.parametrize("stop", [1, 9, 10, 29])
def test_an_interrupted_index_resumed_equals_one_made_at_once(place, monkeypatch, stop):
    monkeypatch.setattr(sizes, "SAVE_EVERY", 5)
    whole = measure(place._replace(identity="another"), bad_inspect)
    seen = []

    def interrupted(i):
        if i == stop:
            raise KeyboardInterrupt
        return bad_inspect(i)

    def counted(i):
        seen.append(i)
        return bad_inspect(i)

    with pytest.raises(KeyboardInterrupt):
        measure(place, interrupted)
    assert_same(measure(place, counted), whole)
    assert sorted(seen) == list(range(stop, len(IMAGES)))
    left = sorted(p.name.split("-")[0] for p in place.folder.rglob("*") if p.is_file())
    assert left == ["sizes", "sizes", "unreadable", "unreadable"]


def whole_name(place) -> str:
    return cache._file_name(place, "sizes")


def test_a_lost_connection_stops_the_pass_and_blames_no_image(place):
    """Otherwise all images would be listed as unreadable for good."""

    lost = threading.Event()

    def offline(i):
        if i == 20:
            lost.set()
        if not lost.is_set():
            return inspect(i)
        try:
            raise OSError(errno.ETIMEDOUT, "timed out")
        except OSError as error:  # as Pillow's reader passes it on
            raise ValueError("timed out") from error

    with pytest.raises(OSError, match="timed out"):
        measure(place, offline)
    assert not list(place.folder.rglob("unreadable*"))
    index = measure(place)
    assert len(index.sizes) == 30 and not index.unreadable


@pytest.mark.parametrize("broken", [0, 13, 29])
def test_a_record_whose_reads_always_fail_is_left_out(place, monkeypatch, broken):
    """Otherwise the pass would stop at it each time it resumes."""
    tries = []

    def failing(i):
        if i != broken:
            return inspect(i)
        tries.append(i)
        raise ConnectionError("503: try again later")

    index = measure(place, failing)
    assert index.unreadable == {broken: "503: try again later"}
    assert len(index.sizes) == 29 and len(tries) == 2
    # The same if a pass resumes at it, with nothing after it.
    state = State(30)
    state.add(map(inspect, range(29)))
    state.save(place, 0, {}, keep=True)
    place.folder.joinpath(".navit", whole_name(place)).unlink()
    index = measure(place, lambda i: failing(broken) if i == 29 else inspect(i))
    assert [*index.unreadable] == [29]


@pytest.mark.parametrize("start", [1, 256, 300, 511])
def test_records_read_before_do_not_show_that_there_is_a_connection(place, start):
    """A file system may answer from its cache what was read before."""
    readable = set(range(start))

    def offline(i):
        if i not in readable:
            raise ConnectionError("no route")
        return inspect(i % 30)

    with pytest.raises(ConnectionError, match="no route"):
        measure(place, offline, 1000)
    assert not list(place.folder.rglob("unreadable*"))
    seen = []
    index = measure(place, lambda i: seen.append(i) or inspect(i % 30), 1000)
    assert sorted(seen) == list(range(start, 1000)) and len(index.sizes) == 1000


def test_a_file_of_many_records_whose_reads_always_fail_is_left_out(place):
    broken = range(200, 800)

    def failing(i):
        if i in broken:
            raise ConnectionError("503")
        return inspect(i % 30)

    assert [*measure(place, failing, 1000).unreadable] == [*broken]


def test_a_record_that_is_readable_the_second_time_is_kept(place):
    seen = set()

    def flaky(i):
        if i % 3 == 0 and i not in seen:
            seen.add(i)
            raise ConnectionError("try again")
        return inspect(i)

    assert_same(measure(place, flaky), sizes.measure(inspect, str, 30, place))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_machine_without_files_or_memory_stops_the_pass(place, number):
    def exhausted(i):
        if i != 7:
            return inspect(i)
        raise ValueError("cannot read") from OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        measure(place, exhausted)
    assert len(measure(place).sizes) == 30


def test_records_left_out_are_logged_again_on_every_opening(place, caplog):
    for _ in range(2):
        measure(place, bad_inspect)
        assert "4 of 30 records are left out, listed in" in caplog.text
        caplog.clear()


def test_changed_data_is_indexed_again_with_a_message(place, caplog):
    measure(place)
    caplog.set_level(logging.INFO, "navit")
    changed = measure(place._replace(fingerprint="of tomorrow"), lambda i: inspect(0))
    assert changed.sizes[5].tolist() == [20, 8]
    assert "the data has changed" in caplog.text


def test_a_damaged_or_pickled_index_is_built_again(place, caplog):
    measure(place)
    other = measure(place._replace(identity="another"))
    file = place.folder / ".navit" / whole_name(place)
    whole = file.read_bytes()
    flips = []
    for offset in (0, 8, 9, 40, 200):
        flipped = bytearray(whole)
        flipped[offset] ^= 2
        flips.append(bytes(flipped))
    cut = (whole[:100], whole[:-30], whole + b"x", b"")
    for damage in (*cut, pickle.dumps({}), *flips):
        file.write_bytes(damage)
        assert_same(measure(place), other)
        assert "built again" in caplog.text
        caplog.clear()


def test_where_the_data_cannot_be_written_the_cache_folder_is_used(place, tmp_path):
    (place.folder / ".navit").write_text("in the way")  # permissions: root has all
    first = measure(place, bad_inspect)
    names = sorted(p.name.split("-")[0] for p in (tmp_path / "cache/navit").iterdir())
    assert names == ["sizes", "unreadable"]
    assert_same(measure(place, lambda i: pytest.fail("read again")), first)


def test_few_images_leave_no_file(place, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_KEPT", len(IMAGES) + 1)
    measure(place, bad_inspect)
    assert not (place.folder / ".navit").exists()
    measure(place, bad_inspect, share=AGAIN)  # navit index --again
    assert (place.folder / ".navit").is_dir()


def test_equal_data_is_described_alike_and_other_data_is_not(place):
    one = measure(place).described
    assert measure(place._replace(identity="x", fingerprint="y")).described == one
    for other in (
        lambda i: inspect(i)._replace(height=21),
        lambda i: inspect(i)._replace(text=0),
        lambda i: inspect(i)._replace(label="x"),
    ):
        assert measure(place, other, share=AGAIN).described != one


def test_no_readable_record_is_an_error_with_the_reason(place):
    with pytest.raises(ValueError, match=r"not one of the 1 .* the set .*not an image"):
        measure(place, lambda i: Entry.of(b"text"), count=1)


def test_no_records_at_all_is_an_error(place):
    with pytest.raises(ValueError, match="the set has no records"):
        measure(place, count=0)


def test_half_a_surrogate_pair_stops_no_index(place):
    odd = Entry.of(IMAGES[0], "a\ud800", ("b\udfff",))
    index = measure(place, lambda i: odd, count=2)
    assert index.words[index.labels].tolist() == [b"a?", b"a?"]


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_upright_and_cost_no_more_than_the_header(format, orientation):
    image = Image.effect_noise((900, 700), 80).convert("RGB")
    file = io.BytesIO()
    image.save(file, format, exif=exif(orientation))
    data, read = file.getvalue(), []

    def read_range(start: int, size: int) -> bytes:
        read.append(size)
        return data[start : start + size]

    with storage.opened(read_range, len(data), 4096) as opened:
        record = Entry.of(opened)
    upright = (700, 900) if orientation < 5 else (900, 700)
    assert (record.height, record.width) == upright
    if format in ("jpeg", "png"):
        assert sum(read) <= 8192 < len(data) // 10


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"icc_profile": b"a profile"}]
)
def test_of_a_webp_only_the_header_is_read(options):
    file, read = io.BytesIO(), []
    Image.effect_noise((900, 700), 80).convert("RGB").save(file, "webp", **options)
    data = file.getvalue()

    def read_range(start: int, size: int) -> bytes:
        read.append(size)
        return data[start : start + size]

    with storage.opened(read_range, len(data), 4096) as opened:
        assert size_of(opened) == (700, 900)
        assert sum(read) <= 8192 < len(data)
        assert opened.read() == data


def test_a_webp_that_its_xmp_turns_is_upright():
    """Pillow takes the orientation from there if there is no EXIF."""
    file = io.BytesIO()
    turned = b'<rdf:Description tiff:Orientation="6"/>'
    Image.new("RGB", (30, 20)).save(file, "webp", xmp=turned)
    assert size_of(file) == (30, 20)


def test_a_range_of_a_file_reads_as_the_file_does(rng):
    data = rng.bytes(1000)
    with storage.opened(lambda a, n: data[a : a + n], 1000, 64) as file:
        plain = io.BytesIO(data)
        for _ in range(300):
            whence = int(rng.integers(3))
            offset = int(rng.integers(-50, 1100)) if whence == 0 else 0
            offset = max(0, offset) if whence == 0 else int(rng.integers(-40, 40))
            try:
                expected = plain.seek(offset, whence)
            except ValueError:
                continue
            assert file.seek(expected) == expected
            count = int(rng.integers(-1, 200))
            assert file.read(count) == plain.read(count)


def test_a_file_left_open_is_closed_when_python_ends(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")
    descriptor = storage._Descriptor(str(tmp_path / "a"))
    with monkeypatch.context() as ending:
        ending.setattr(storage, "os", None)  # modules are emptied before
        descriptor.__del__()
    with pytest.raises(OSError):
        os.fstat(descriptor.number)
    del descriptor.number


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    shutil.copytree(SAMPLE, tmp_path / "photos")
    return tmp_path / "photos"


def test_a_folder_keeps_its_index_and_sees_a_changed_file(photos, caplog):
    caplog.set_level(logging.INFO, "navit")
    first = FolderSource(Folder(str(photos)))
    (file,) = (photos / ".navit").iterdir()
    stamp = file.stat().st_mtime_ns
    again = FolderSource(Folder(str(photos)))
    assert file.stat().st_mtime_ns == stamp and "changed" not in caplog.text
    assert again.fingerprint() == first.fingerprint()
    rotated = [Path(first.name(i)).name for i in range(17)].index("coffee_rotated.jpg")
    assert again.sizes[rotated].tolist() == [400, 600]
    name = photos / "cat.jpg"
    before = name.stat()
    Image.new("RGB", (33, 44)).save(name)
    os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = FolderSource(Folder(str(photos)))
    assert [44, 33] in changed.sizes.tolist()
    assert "changed" in caplog.text
    assert changed.fingerprint() != first.fingerprint()


def test_the_parts_of_a_split_share_one_index(photos):
    parts = [FolderSource(Folder(str(photos), split=s)) for s in ("train", "eval")]
    assert len(list((photos / ".navit").iterdir())) == 1
    assert sum(map(len, parts)) == 17


def test_an_opener_reads_the_parts_of_a_split_once(photos, monkeypatch, caplog):
    (photos / "cat.jpg").write_bytes(b"no image")
    alone = [FolderSource(Folder(str(photos), split=s)) for s in ("train", "eval")]
    reads, real = [], folder.read_table
    monkeypatch.setattr(
        folder, "read_table", lambda *x, **y: reads.append(x) or real(*x, **y)
    )
    caplog.clear()
    opener = Opener(AGAIN)
    parts = [opener.open(Folder(str(photos), split=s)) for s in ("train", "eval")]
    assert len(reads) == 1
    assert caplog.text.count("left out, unreadable") == 1
    for part, other in zip(parts, alone, strict=True):
        assert part.fingerprint() == other.fingerprint()
        assert part.version() == other.version() and part.left_out == other.left_out
        labels, expected = part.tasks["label"], other.tasks["label"]
        assert labels.class_names == expected.class_names
        np.testing.assert_array_equal(labels.labels, expected.labels)
    assert opener.open(Folder(str(photos), split="eval")) is parts[1]


def run(capsys, *arguments: str) -> str:
    assert main(["index", *arguments]) == 0
    return capsys.readouterr().out


def test_navit_index_keeps_the_sizes_and_prints_them(photos, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from navit.config import *\n"
        "def get_config():\n"
        f"    data = DataConfig(train=Folder({str(photos)!r}, split='train'),\n"
        "                      eval=Folder(split='eval'))\n"
        "    return Config(data=data)\n"
    )
    (photos / "cat.jpg").write_bytes(b"no image")
    lines = run(capsys, str(config), "data.train.split=all").splitlines()
    assert lines[0] == "data.train: 16 images, 1 unreadable"
    heights = next(line for line in lines if line.startswith("  height  ")).split()
    assert (heights[1], heights[-1]) == ("60", "1411")
    assert lines[1] == "  task label: 7 classes, 16 images labelled"
    parts = run(capsys, str(config)).splitlines()
    counts = [int(line.split()[1]) for line in parts if line.startswith("data.")]
    assert len(counts) == 2 and sum(counts) == 16
    assert len(list((photos / ".navit").glob("sizes-*"))) == 1
    # A file mended without a change of size or time is only noticed with --again.
    before = (photos / "cat.jpg").stat()
    data = (SAMPLE / "coin_small.jpg").read_bytes()
    (photos / "cat.jpg").write_bytes(data)
    os.utime(photos / "cat.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "17 images, 0 unreadable" in run(
        capsys, str(config), "--again", "data.train.split=all"
    )
