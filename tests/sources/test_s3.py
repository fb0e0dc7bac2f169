"""An emulated S3 through s3fs, whose buckets differ from folders and memory://."""

import io
import tarfile
import uuid

import jax.numpy as jnp
import pytest
import s3fs
from helpers import tiny_config
from moto.server import ThreadedMotoServer
from PIL import Image

from navit.config import TarShards
from navit.sources import index as sizes
from navit.sources.bucket import Bucket
from navit.sources.index import Share, Unfinished
from navit.sources.local_cache import LocalCache
from navit.sources.records import RecordSource
from navit.sources.remote import Remote
from navit.sources.tar import TarReader
from navit.train import remote_lock, remote_workdir
from navit.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def store():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def url(store):
    """A bucket of its own."""
    name = uuid.uuid4().hex
    store.mkdir(name)
    return f"s3://{name}"


def test_a_bucket_keeps_files_as_a_folder_does(url, tmp_path):
    bucket = Bucket(f"{url}/run")
    assert bucket.names() == [] and bucket.read("a") is None
    for name in ("a", "b/c"):
        path = tmp_path / "sent" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    bucket.send(tmp_path / "sent", ["a", "b/c"], "old")
    bucket.write("old/d", b"")
    other = Bucket(f"{url}/run")
    assert other.names() == ["old/a", "old/b/c", "old/d"]
    bucket.move("old", "new/1")
    assert other.names() == ["new/1/a", "new/1/b/c", "new/1/d"]
    assert other.read("new/1/b/c", stop=2) == b"b/"
    other.fetch(other.names(), tmp_path / "fetched")
    assert (tmp_path / "fetched/new/1/d").read_bytes() == b""
    bucket.remove("new/1/b")
    bucket.remove("nothing")
    assert other.names("new") == ["new/1/a", "new/1/d"]


def test_shards_are_indexed_and_read(url, tmp_path, monkeypatch):
    """By two hosts, each with a cache of its own."""
    monkeypatch.setattr(sizes, "MIN_KEPT", 0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                file = io.BytesIO()
                Image.new("RGB", (8 + i, 20 + shard)).save(file, "jpeg")
                for suffix, data in (("jpg", file.getvalue()), ("txt", b"a box")):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    Bucket(url).send(tmp_path, ["0.tar", "1.tar"], "set")
    local = RecordSource(TarReader(TarShards(f"{tmp_path}")))

    def host(process: int) -> RecordSource:
        monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/host{process}")
        share = Share(process=process, processes=2, publish=True)
        cache = LocalCache(tmp_path / "cache", 1 << 20)
        shards = TarShards(f"{url}/set/{{0..1}}.tar")
        return RecordSource(TarReader(shards, share=share, cache=cache), share=share)

    with pytest.raises(Unfinished):
        host(0)
    source = host(1)
    assert source.fingerprint() == local.fingerprint()
    found, expected = source.neighbours(range(6)), local.neighbours(range(6))
    assert found == expected and found[4].captions == ("a box",)


def test_a_run_is_locked_saved_and_read(url, monkeypatch):
    monkeypatch.setattr(remote_lock, "_BEAT_SECONDS", 0.2)
    workdir = f"{url}/runs/a"
    with remote_workdir.training(workdir) as (folder, sender):
        with (
            pytest.raises(ValueError, match=rf"is training in {workdir}"),
            remote_workdir.training(workdir),
        ):
            pass
        (folder / "config.json").write_text("{}")
        checkpoints = Checkpoints(folder, keep=1, remote=sender)
        checkpoints.save_model({"w": jnp.ones(3)}, tiny_config())
        checkpoints.close()
    assert Bucket(workdir).read("lock") is None
    Bucket(workdir).write("checkpoints/1/part", b"of a run that was killed")
    with remote_workdir.training(workdir) as (folder, _):
        assert (folder / "config.json").read_text() == "{}"
        assert (folder / "checkpoints/0/SHA256SUMS").exists()
    assert not Bucket(workdir).names("checkpoints/1")


def test_errors_name_the_url_in_one_line(url, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"s3://none/run: .*does not exist"):
        Bucket("s3://none/run").write("a", b"")
    monkeypatch.setattr("navit.sources.remote._WAITS", (0.01,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConnectionError, match=rf"{url}/a: Could not connect"):
        Remote(url).stat(f"{url}/a")
    s3fs.S3FileSystem.clear_instance_cache()
