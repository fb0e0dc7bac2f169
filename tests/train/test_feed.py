"""navit.train.feed: the next batch is on its way while a step runs."""

import threading
import time

import jax
import numpy as np
import pytest

from navit.batch import Batch, PackedImages
from navit.sharding import Rules
from navit.train.feed import Feed


def batch(number: int) -> Batch:
    images = PackedImages(
        np.zeros((2, 4, 12), np.uint8),
        np.zeros((2, 4), np.int32),
        np.zeros((2, 4, 2), np.int32),
        np.zeros((2, 3, 2), np.int32),
    )
    slots = np.zeros((2, 3), np.int32)
    text = np.zeros((2, 3, 5), np.int32)
    ids = np.array([[number, -1, 2**31], [2**32 - 1, 2**40, -1]])
    return Batch(images, text, slots, slots, ids, text[..., :2])


def stream(count: int, seconds: float = 0.0, read: list[int] | None = None):
    for i in range(count):
        time.sleep(seconds)
        if read is not None:
            read.append(i)
        yield batch(i)


@pytest.fixture
def device(monkeypatch):
    """A device whose steps end when they are let: waiting for one takes its event."""
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: metrics["end"].wait())
    return lambda: {"end": threading.Event()}


def test_batches_come_in_order_each_on_the_device_too():
    found = []
    with Feed(stream(5), Rules()) as feed:
        for _ in range(5):
            host, on_device = feed.take()
            assert isinstance(on_device.owner, jax.Array) and on_device.id is None
            np.testing.assert_array_equal(host.owner, on_device.owner)
            np.testing.assert_array_equal(host.images.grids, on_device.images.grids)
            found.append(int(host.id[0, 0]))
            feed.ahead({"loss": on_device.owner.sum()})
    assert found == [0, 1, 2, 3, 4]


def test_the_next_batch_is_read_while_a_step_runs_and_no_more(device):
    read: list[int] = []
    with Feed(stream(4, read=read), Rules()) as feed:
        feed.take()
        assert read == [0]
        first, second = device(), device()
        assert feed.ahead(first) == 0.0  # returns although the step has not ended
        assert read == [0, 1]
        feed.take()
        threading.Timer(0.2, first["end"].set).start()
        start = time.perf_counter()
        feed.ahead(second)  # a third batch only when the first has left the device
        assert time.perf_counter() - start > 0.1
        assert read == [0, 1, 2]
        second["end"].set()


def test_only_the_time_that_the_device_waits_counts(device):
    with Feed(stream(3, seconds=0.4), Rules()) as feed:
        step = device()
        feed.take()
        threading.Timer(0.1, step["end"].set).start()
        assert 0.1 < feed.ahead(step) < 0.39  # the step ran for the first 0.1
        longer = device()
        feed.take()
        assert feed.ahead(longer) == 0.0  # it runs on when the batch is there
        longer["end"].set()


def test_a_read_error_reaches_the_caller():
    def broken():
        yield batch(0)
        raise OSError("the storage is gone")

    with Feed(broken(), Rules()) as feed:
        _, on_device = feed.take()
        with pytest.raises(OSError, match="storage is gone"):
            feed.ahead({"loss": on_device.owner.sum()})
