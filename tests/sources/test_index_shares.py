"""navit.sources.index: shared by processes, and of 10^9 images."""

import io
import pickle
import resource
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from navit.cli import main
from navit.config import TarShards
from navit.sources import cache
from navit.sources import index as sizes
from navit.sources.index import Share, Unfinished
from navit.sources.index_join import Index
from navit.sources.kinds import Opener
from navit.sources.mapped import Stored
from navit.sources.mixture import MixtureSource
from navit.sources.records import Raw, RecordSource
from navit.sources.synthetic import SyntheticSource
from navit.sources.tar import TarReader

URL = "memory://index/set"
SHARDS, SAMPLES = 5, 6


def photo(width: int, height: int, padding: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 40, 10)).save(file, "jpeg")
    return file.getvalue() + bytes(padding)


def shard(number: int, padding: int = 0) -> bytes:
    """Samples of which one has no image, one a damaged image and one no caption."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(SAMPLES):
            key = f"{number}{i}"
            image = photo(8 + i, 20 + number, padding) if i != 2 else b"damaged"
            members = {"jpg": image, "txt": b"caption " * i, "cls": b"%d" % (i % 3)}
            if number == 1 and i == 4:
                del members["jpg"]
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Shards behind memory://, and (path, bytes) of each read of them."""
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    read, seen = type(memory).cat_file, []

    def cat_file(self, path, start=None, end=None):
        data = read(self, path, start=start, end=end)
        seen.append((Path(path).name, len(data)))
        return data

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    for number in range(SHARDS):
        memory.pipe_file(f"/index/set/{number}.tar", shard(number))
    yield seen
    memory.store.clear()


def opened(share: Share = sizes.ALL) -> RecordSource:
    return RecordSource(TarReader(TarShards(URL), share=share), share=share)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_that_share_the_shards_make_the_index_of_one(
    reads, tmp_path, monkeypatch, processes
):
    alone = opened()
    expected = files(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    reads.clear()
    for process in range(processes - 1, 0, -1):
        with pytest.raises(Unfinished, match=rf"process {process} of {processes}"):
            opened(Share(process=process, processes=processes))
    assert "0.tar" not in {name for name, _ in reads}
    last = opened(Share(process=0, processes=processes))
    assert files(tmp_path / "shared") == expected  # and no part is left
    assert last.fingerprint() == alone.fingerprint()
    assert sorted(name for name, _ in reads) == [f"{n}.tar" for n in range(SHARDS)]
    for i in range(len(alone)):
        one, other = alone.record(i), last.record(i)
        assert one.image.read() == other.image.read()
        assert (one.captions, alone.name(i)) == (other.captions, last.name(i))


def test_hosts_share_an_index_beside_the_data(reads, tmp_path, monkeypatch):
    """Each has a cache of its own."""

    def host(number: int, process: int, processes: int = 2) -> RecordSource:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
        return opened(Share(process=process, processes=processes, publish=True))

    memory = fsspec.filesystem("memory")
    with pytest.raises(Unfinished, match=r"in memory://.*/set/\.navit"):
        host(0, 0)
    joined = host(1, 1)
    names = [path for path in memory.find("/index/set/.navit")]
    assert len(names) == 1 and names[0].endswith(".arrays")
    seen = [name for name, _ in reads if name.endswith(".tar")]
    assert sorted(seen) == [f"{n}.tar" for n in range(SHARDS)]
    reads.clear()
    copied = host(2, 0, processes=1)
    assert copied.fingerprint() == joined.fingerprint()
    assert not [name for name, _ in reads if name.endswith(".tar")]
    # Another host takes over what one that is gone has finished.
    memory.rm("/index/set/.navit", recursive=True)
    with pytest.raises(Unfinished):
        host(3, 0)
    memory.pipe_file("/index/set/0.tar", shard(0, 100))  # the data changes
    reads.clear()
    assert len(host(4, 0, processes=1)) == len(joined)
    assert len([name for name, _ in reads if name.endswith(".tar")]) == SHARDS


def test_an_index_made_again_has_nothing_from_before(reads):
    before = opened()
    for process in (0, 1):  # the parts of a pass that was not finished
        with pytest.raises(Unfinished):
            opened(Share(again=True, process=process, processes=3))
    reads.clear()
    with pytest.raises(Unfinished, match="process 1 of 2"):
        opened(Share(again=True, process=1, processes=2))
    assert {name for name, _ in reads} == {"1.tar", "3.tar"}
    reads.clear()
    made = opened(Share(again=True, process=0, processes=2))
    assert {name for name, _ in reads} == {"0.tar", "2.tar", "4.tar"}
    assert made.fingerprint() == before.fingerprint()
    with pytest.raises(Unfinished, match="6 of 7 has nothing to read; the last makes"):
        opened(Share(again=True, process=SHARDS + 1, processes=SHARDS + 2))


def test_a_later_call_joins_what_processes_have_left(reads):
    for process in (0, 1):
        with pytest.raises(Unfinished, match="and others are not"):
            opened(Share(process=process, processes=3))
    reads.clear()
    assert len(opened()) == SHARDS * (SAMPLES - 1) - 1
    assert {name for name, _ in reads} == {"2.tar"}
    reads.clear()
    opened(Share(process=2, processes=3))
    assert not reads


def test_shards_that_were_finished_are_not_read_again(reads, monkeypatch):
    memory = fsspec.filesystem("memory")
    read = type(memory).cat_file
    monkeypatch.setattr("navit.sources.tar._AT_ONCE_REMOTE", 1)

    def broken(self, path, **options):
        if path.endswith("3.tar"):
            raise KeyboardInterrupt
        return read(self, path, **options)

    with monkeypatch.context() as context:
        context.setattr(type(memory), "cat_file", broken)
        with pytest.raises(KeyboardInterrupt):
            opened()
    assert {name for name, _ in reads} == {f"{n}.tar" for n in range(3)}
    reads.clear()
    resumed = opened()
    assert {name for name, _ in reads} == {"3.tar", "4.tar"}
    assert resumed.fingerprint() == opened(Share(again=True)).fingerprint()


def test_of_large_images_only_the_heads_are_read(reads):
    opened()
    small = [size for _, size in reads]
    total = SHARDS * len(shard(0))
    assert len(small) == SHARDS and sum(small) <= total  # each shard in one piece
    memory = fsspec.filesystem("memory")
    large = shard(0, 2_000_000)
    for number in range(SHARDS):
        memory.pipe_file(f"/index/set/{number}.tar", shard(number, 2_000_000))
    reads.clear()
    source = opened()
    assert len(source) == SHARDS * (SAMPLES - 1) - 1
    read = sum(size for _, size in reads)
    assert read < 0.05 * SHARDS * len(large)
    assert len(reads) <= SHARDS * (SAMPLES + 1)
    assert source.sizes[0].tolist() == [20, 8]


def test_navit_index_in_two_processes(reads, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from navit.config import *\n"
        "def get_config():\n"
        f"    return Config(data=DataConfig(train=TarShards({URL!r})))\n"
    )
    command = ["index", str(config), "--processes", "2", "--process"]
    assert main([*command, "0"]) == 0
    assert "process 0 of 2 is done, and others are not" in capsys.readouterr().out
    assert main([*command, "1"]) == 0
    assert "24 images, 5 unreadable" in capsys.readouterr().out
    for wrong in (["0", "--processes", "0"], ["2"]):
        assert main([*command, *wrong]) != 0
        assert "name both" in capsys.readouterr().err


class Nameless:
    """A reader of records that are only counted."""

    def __init__(self, place: cache.Place, index: Index) -> None:
        self.place, self.index = place, index
        self.classes: tuple[str, ...] = ()
        self.damaged: list[str] = []

    def __len__(self) -> int:
        return self.index.count

    def name(self, index: int) -> str:
        raise NotImplementedError

    def record(self, index: int) -> Raw:
        raise NotImplementedError


def test_a_billion_images_open_without_being_read(tmp_path):
    count, bad = 10**9, 3
    place = cache.Place(tmp_path, "the set", "of today")
    shapes = {
        "sizes": (np.dtype(np.int32), (count - bad, 2)),
        "labels": (np.dtype(np.int32), (count - bad,)),
        "words": (np.dtype("S1"), (0,)),
        "bad_after": (np.dtype(np.int64), (bad,)),
        "reasons": (np.dtype("S2"), (bad,)),
        "members": (np.dtype(np.uint32), (count, 3, 2)),
        "ends": (np.dtype(np.int64), (10**5,)),
    }

    def fill(arrays):
        arrays["bad_after"][:] = 10, 10, count - bad
        arrays["sizes"][-1] = 3, 4
        return {"count": count, "described": "the images", "top": 9}

    cache.write_arrays(place, "sizes", shapes, fill, sparse=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stored = cache.read_arrays(place, "sizes")
    assert stored is not None
    source = RecordSource(Nameless(place, Index.of(stored)))
    assert len(source) == count - bad and source.left_out == bad
    assert source.sizes[-1].tolist() == [3, 4]
    places = np.array([0, 9, 10, count - bad - 1])
    assert source._index.records(places).tolist() == [0, 9, 12, count - 2]
    written = pickle.dumps(source)
    assert len(written) < 10_000
    copy = pickle.loads(written)
    assert copy.sizes[-1].tolist() == [3, 4] and copy.tasks["label"].labels[-1] == 0
    some = pickle.loads(pickle.dumps(source.sizes[-2:]))
    assert some.tolist() == [[0, 0], [3, 4]]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 50_000  # KiB


def test_an_index_built_again_is_not_taken_for_the_old_one(tmp_path):
    def written(place: cache.Place) -> Stored:
        shapes = {"sizes": (np.dtype(np.int32), (4, 2))}
        return cache.write_arrays(place, "sizes", shapes, lambda arrays: {})

    place = cache.Place(tmp_path, "the set", "of today")
    data = pickle.dumps(written(place).arrays["sizes"])
    written(place._replace(fingerprint="of tomorrow"))
    with pytest.raises(ValueError, match="has been built again: start the run again"):
        pickle.loads(data)


def test_an_index_of_an_earlier_version_is_built_again_with_one_line(
    reads, tmp_path, caplog
):
    caplog.set_level("INFO", "navit")
    opened()
    (file,) = (tmp_path / "cache").rglob("*.arrays")
    old = file.with_suffix(".npz")
    file.rename(old)
    Opener().open(TarShards(URL))
    assert caplog.text.count("of an earlier version of navit") == 1
    assert file.exists() and not old.exists()


def test_a_large_mixture_keeps_its_sizes_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = [SyntheticSource(20, seed) for seed in range(2)]
    small = MixtureSource(sources)
    monkeypatch.setattr("navit.sources.mixture._IN_MEMORY", 10)
    for _ in range(2):
        large = MixtureSource(sources)
        assert large.sizes.tolist() == small.sizes.tolist()
        for name, task in small.tasks.items():
            assert large.tasks[name].labels.tolist() == task.labels.tolist()
        assert len(pickle.dumps(large.sizes)) < 1000
    assert len(list(tmp_path.rglob("*.arrays"))) == 1 + len(small.tasks)
