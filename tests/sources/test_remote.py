"""navit.sources.remote: many reads in flight, retries, and a clear end."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import Busy, serve

from navit.sources.remote import Remote
from navit.sources.storage import find
from navit.sources.transient import Retries


@pytest.fixture
def store(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    return serve(monkeypatch, tmp_path)


def test_each_thread_has_a_read_in_flight(store):
    store.latency = 0.05
    remote = Remote("store://a")
    with ThreadPoolExecutor(32) as pool:
        found = list(
            pool.map(lambda i: remote.read_range("store://a", i, 2), range(64))
        )
    store.latency = 0.0
    assert found == [bytes([i, i + 1]) for i in range(64)]
    assert store.most >= 16


def test_a_read_that_hangs_is_asked_again(store, monkeypatch):
    monkeypatch.setattr("navit.sources.remote._PATIENCE", 0.2)
    monkeypatch.setattr("navit.sources.remote._WAITS", (0.01,))
    remote = Remote("store://a")
    store.faults += [store.hang]
    assert remote.read_range("store://a", 3, 1) == b"\3"
    store.faults += [store.hang, store.hang]
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="store://a"):
        remote.read_range("store://a", 3, 1)
    assert time.monotonic() - begun < 5


def test_a_busy_store_is_asked_again_until_a_bound(store, monkeypatch):
    monkeypatch.setattr("navit.sources.remote._WAITS", (0.01, 0.01))
    remote = Remote("store://a")
    store.faults += [Busy(), Busy()]
    assert remote.read_range("store://a", 0, 2) == b"\0\1"
    store.faults += [Busy()] * 3
    with pytest.raises(ConnectionError, match="store://a"):
        remote.read_range("store://a", 0, 2)
    assert not store.faults


def test_an_answer_to_another_thread_does_not_break_a_retry():
    class Retried(Retries):
        _failing_since = property(lambda _: None, lambda *_: None)  # reset at once

    def ask():
        if errors:
            raise errors.pop()
        return 7

    errors = [ConnectionResetError()]
    assert Retried(0.0, patience=60.0)(ask) == 7


def test_a_file_that_may_not_be_read_is_not_missing(store, monkeypatch):
    async def refuse(self, path, **options):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(store, "_info", refuse)
    remote = Remote("store://a")
    with pytest.raises(OSError, match="store://a: Forbidden"):
        find(remote, "store://{a,b}", ("a", "b"), missing=1.0)


def test_a_server_without_ranges_is_named(store, monkeypatch):
    async def whole(self, path, start=None, end=None):
        return bytes(200)

    monkeypatch.setattr(store, "_cat_file", whole)
    with pytest.raises(OSError, match=r"store://a.*cannot send a part"):
        Remote("store://a").read_range("store://a", 0, 2)
