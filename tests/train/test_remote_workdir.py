"""Work directories behind a URL: the same runs as on a disk."""

import signal
import uuid
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from test_loop import interrupt_at, logged, restored

import navit
from navit.config import override
from navit.sources.bucket import Bucket
from navit.train import loop, remote_lock, remote_workdir
from navit.train.checkpoint import Checkpoints
from navit.train.interruption import Outcome

CONFIG = override(tiny_config(), ["optim.ema=0.7", "data.eval=none"])


@pytest.fixture(autouse=True)
def quick_locks(monkeypatch):
    monkeypatch.setattr(remote_lock, "_BEAT_SECONDS", 0.05)


@pytest.fixture
def url():
    yield f"memory://{uuid.uuid4().hex}/run"
    fsspec.filesystem("memory").store.clear()


def train(url, config=CONFIG):
    with remote_workdir.training(url) as (workdir, sender):
        return loop.train(config, workdir, remote=sender)


def copied(url, folder):
    """A work directory with everything that a URL has."""
    bucket = Bucket(url)
    bucket.fetch(bucket.names(), folder)
    return folder


def steps(url):
    return remote_workdir.Remote(Bucket(url), Path()).steps()


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert loop.train(CONFIG, workdir) is Outcome.DONE
    return workdir


def test_a_run_behind_a_url_is_the_same_run(whole, url, tmp_path, caplog):
    """Preempted, killed while it writes, damaged and resumed."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5, signal.SIGTERM)
        assert train(url) is Outcome.PREEMPTED
    assert steps(url) == [3, 5]
    bucket = Bucket(url)
    assert bucket.read("lock") is None
    # A write of step 6 that was killed, and the damage of the step before it.
    bucket.write("checkpoints/6/model/part", b"cut")
    name = next(x for x in bucket.names("checkpoints/5") if "/opt_state/" in x)
    bucket.write(name, b"damaged")
    caplog.set_level("INFO", logger="navit")
    assert train(url) is Outcome.DONE
    assert "of vectors in" not in caplog.text  # which would not be sent
    assert steps(url) == [3, 6]
    assert any(x.startswith("damaged/5-") for x in bucket.names())
    assert "checkpoints/6/model/part" not in bucket.names()
    local = copied(url, tmp_path / "run")
    assert_equal(restored(local, CONFIG), restored(whole, CONFIG))
    for a, b in zip(logged(local), logged(whole), strict=True):
        assert a["step"] == b["step"] and a.get("loss") == b.get("loss")
    assert (local / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert not [x for x in bucket.names() if "/sent/" in x]


def test_models_are_read_from_a_url(whole, url, monkeypatch):
    bucket = Bucket(url)
    files = [x for x in whole.rglob("*") if x.is_file()]
    bucket.send(whole, [x.relative_to(whole).as_posix() for x in files])
    fetched, real = [], Bucket.fetch
    monkeypatch.setattr(
        Bucket,
        "fetch",
        lambda self, names, to: fetched.extend(names) or real(self, names, to),
    )
    assert_equal(navit.load(url).model, navit.load(whole).model)
    assert_equal(navit.load(url, raw=True).model, navit.load(whole, raw=True).model)
    assert fetched and not [x for x in fetched if "/opt_state/" in x]
    with remote_workdir.reading(url) as workdir:
        (workdir / "budgets.md").write_text("a table")
    assert bucket.read("budgets.md") == b"a table"
    with pytest.raises(FileNotFoundError, match="is not a navit work directory"):
        navit.load(f"{url}/none")


def test_a_second_run_is_refused_and_a_dead_one_is_not(url):
    bucket = Bucket(url)
    with remote_lock.held(bucket) as first:
        with (
            pytest.raises(ValueError, match=r"is training in memory://.* wait for it"),
            remote_lock.held(bucket),
        ):
            pass
        first.check()
    assert bucket.read("lock") is None
    bucket.write("lock", b'{"holder": "a run that was killed", "id": "1"}')
    with remote_lock.held(bucket) as lock:
        bucket.write("lock", b'{"holder": "another", "id": "2"}')
        while not lock._lost_to:
            pass
        with pytest.raises(ValueError, match="another is training in"):
            lock.check()


def test_a_run_that_has_lost_its_lock_replaces_no_file(url):
    bucket = Bucket(url)
    with (
        pytest.raises(ValueError, match="another is training in"),
        remote_workdir.training(url) as (workdir, sender),
    ):
        (workdir / "metrics.jsonl").write_text("of the run that lost it")
        bucket.write("metrics.jsonl", b"of the other run")
        while not sender.lock._lost_to:
            bucket.write("lock", b'{"holder": "another", "id": "2"}')
    assert bucket.read("metrics.jsonl") == b"of the other run"


def test_a_changed_config_is_refused_before_the_lock(whole, url):
    bucket = Bucket(url)
    files = [x for x in whole.rglob("*") if x.is_file()]
    bucket.send(whole, [x.relative_to(whole).as_posix() for x in files])
    bucket.write("lock", b'{"holder": "a run that was killed", "id": "1"}')
    other = override(CONFIG, ["optim.ema=0.8"])
    with (
        pytest.raises(ValueError, match=rf"{url} holds a run with another config"),
        remote_workdir.training(url, other),
    ):
        pass
    assert b"killed" in (bucket.read("lock") or b"")


def test_a_server_of_http_is_no_work_directory():
    with (
        pytest.raises(ValueError, match="nothing can be written behind http"),
        remote_workdir.training("http://localhost:1/run"),
    ):
        pass


def test_a_folder_is_moved_without_being_read(url, monkeypatch):
    bucket = Bucket(url)
    for name in ("a", "b/c"):
        bucket.write(f"old/{name}", name.encode())
    with monkeypatch.context() as patch:
        patch.delattr(type(fsspec.filesystem("memory")), "cat_file")
        bucket.move("old", "new")
    assert bucket.names() == ["new/a", "new/b/c"]
    assert bucket.read("new/b/c") == b"b/c"


def test_errors_name_the_url(url, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("403 Forbidden\nmore")

    monkeypatch.setattr(fsspec.filesystem("memory"), "put_file", refuse)
    with (
        pytest.raises(OSError, match="403 Forbidden") as error,
        remote_workdir.training(url) as (workdir, sender),
    ):
        checkpoints = Checkpoints(workdir, keep=1, remote=sender)
        checkpoints.save_model({"w": jnp.ones(3)}, CONFIG)
        checkpoints.close()
    message = str(error.value)
    assert f"cannot write the checkpoint {url}/checkpoints/0" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="'nothing://bucket' cannot be opened"):
        Bucket("nothing://bucket")
    with pytest.raises(ValueError, match=r"has a file '\.\./x': delete it"):
        Bucket(url).fetch(["../x"], tmp_path)
