"""navit.sources.local_cache: shared, bounded, and safe under kill -9."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from navit.config import DataConfig
from navit.sources.local_cache import LocalCache, open_cache

MIB = 1 << 20


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def test_what_several_need_is_fetched_once(tmp_path):
    fetched, lock = [], threading.Lock()

    def read(number: int) -> bytes:
        def fetch() -> bytes:
            with lock:
                fetched.append(number % 4)
            return bytes([number % 4]) * 1000

        return LocalCache(tmp_path, MIB).read(f"key {number % 4}", 1000, fetch)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, range(64)))
    assert found == [bytes([number % 4]) * 1000 for number in range(64)]
    assert sorted(fetched) == [0, 1, 2, 3]
    assert not list((tmp_path / "parts").iterdir())


def test_the_oldest_make_room_and_the_limit_holds(tmp_path):
    limit = 20_000
    cache = LocalCache(tmp_path, limit)
    for number in range(100):
        cache.read(str(number), 996, lambda: os.urandom(996))
        sizes = [path.stat().st_size for path in entries(tmp_path)]
        assert sum(sizes) <= limit
    assert len(sizes) >= 0.9 * limit / 1000
    cache.read("99", 996, lambda: pytest.fail("the newest is gone"))
    assert cache.read("0", 996, lambda: b"again") == b"again"
    big = bytes(limit)
    assert cache.read("big", limit, lambda: big) == big  # and it is not kept
    assert cache.read("big", limit, lambda: b"other") == b"other"
    with pytest.raises(ValueError, match=r"does not fit into data.cache_gib"):
        cache.file("big", limit + 1, lambda file: None)


def test_a_damaged_entry_is_fetched_again(tmp_path):
    cache = LocalCache(tmp_path, MIB)
    cache.read("a", 100, lambda: bytes(100))
    (entry,) = entries(tmp_path)
    for damaged in (b"", bytes(50), b"x" + entry.read_bytes()[1:]):
        entry.write_bytes(damaged)
        assert cache.read("a", 100, lambda: bytes(100)) == bytes(100)
        cache.read("a", 100, lambda: pytest.fail("it was not kept"))


def test_an_error_of_the_store_is_that_of_the_reader(tmp_path, caplog):
    cache = LocalCache(tmp_path, MIB)

    def fail() -> bytes:
        raise ConnectionError("no answer")

    with pytest.raises(ConnectionError, match="no answer"):
        cache.read("a", 100, fail)
    assert cache.read("a", 100, lambda: bytes(100)) == bytes(100)
    cache.read("a", 100, lambda: pytest.fail("it was not kept"))
    assert not caplog.records


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, caplog):
    cache = LocalCache(tmp_path, MIB)
    cache.read("before", 10, lambda: bytes(10))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalCache, "_keep", full)
    for number in range(3):
        assert cache.read(str(number), 10, lambda: b"0123456789") == b"0123456789"
    cache.read("before", 10, lambda: pytest.fail("what was kept is of use"))
    (record,) = caplog.records
    assert "No space left" in record.getMessage() and str(tmp_path) in record.message
    assert not list((tmp_path / "parts").iterdir())


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = LocalCache(tmp_path / "file" / "cache", MIB)
    for _ in range(2):
        assert cache.read("a", 3, lambda: b"abc") == b"abc"
    assert len(caplog.records) == 1


# Writes half of an entry, and waits to be killed.
_KILLED = """
import sys, time
from pathlib import Path
from navit.sources.local_cache import LocalCache

def write(file):
    file.write(bytes(500))
    file.flush()
    print("half", flush=True)
    time.sleep(60)

LocalCache(Path(sys.argv[1]), 5000).file("a", 4000, write)
"""


def test_a_writer_that_is_killed_holds_nobody_up_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        cache = LocalCache(tmp_path, 5000)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                cache.file, "a", 4000, lambda file: file.write(bytes(4000))
            )
            writer.send_signal(signal.SIGKILL)
            path = waiting.result(timeout=30)
    assert path.read_bytes() == bytes(4000)
    # The part of a killed writer that nobody waits for is deleted to make room.
    (tmp_path / "parts" / "dead").write_bytes(bytes(4000))
    (tmp_path / "total").write_text("9000")
    for number in range(4):
        cache.read(str(number), 996, lambda: bytes(996))
    assert not list((tmp_path / "parts").iterdir())
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 5000


def test_the_cache_of_a_config(tmp_path):
    assert open_cache(DataConfig()) is None
    cache = open_cache(DataConfig(cache="~/x", cache_gib=0.5))
    assert cache is not None and cache.folder == Path.home() / "x"
    with pytest.raises(ValueError, match="cache_gib"):
        DataConfig(cache_gib=0.0)
    with pytest.raises(ValueError, match="name a local folder"):
        DataConfig(cache="gs://bucket/cache")
