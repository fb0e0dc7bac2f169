"""Every format behind a URL: bit-equal to local, and read once with a cache."""

import dataclasses
import io
import itertools
import pickle
import tarfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from helpers import serialize_example, tiny_config
from PIL import Image
from stores import Busy, serve

from navit.config import (
    ArrayRecords,
    Folder,
    ParquetImages,
    TarShards,
    Tfds,
    override,
)
from navit.input import pipeline
from navit.input.image_list import images_of
from navit.sources.kinds import Opener
from navit.sources.local_cache import LocalCache

SHARDS, IMAGES = 3, 24  # of each shard


class Noise(tfds.core.GeneratorBasedBuilder):
    """Images with captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, (image, caption) in enumerate(make_images()):
            yield i, {"image": io.BytesIO(image), "caption": caption}


def make_images() -> list[tuple[bytes, str]]:
    rng, made = np.random.default_rng(0), []
    for i in range(SHARDS * IMAGES):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (60, 40 + i % 30, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        made.append((file.getvalue(), f"image {i}"))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The same images in every format."""
    root, images = tmp_path_factory.mktemp("data"), make_images()
    for kind in ("tars", "array_record", "parquet", "folder"):
        (root / kind).mkdir()
    for shard in range(SHARDS):
        part = images[shard * IMAGES : (shard + 1) * IMAGES]
        with tarfile.open(root / f"tars/{shard}.tar", "w") as tar:
            for i, (image, caption) in enumerate(part):
                for suffix, content in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard}-{i}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        path = str(root / f"array_record/{shard}.array_record")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for image, caption in part:
            writer.write(serialize_example({"image": image, "caption": caption}))
        writer.close()
        table = pa.table(
            {"image": [x for x, _ in part], "caption": [x for _, x in part]}
        )
        file = root / f"parquet/{shard}.parquet"
        pa.parquet.write_table(table, file, row_group_size=8, compression="none")
    lines = ["file,caption"]
    for i, (image, caption) in enumerate(images):
        (root / f"folder/{i}.jpg").write_bytes(image)
        lines.append(f"{i}.jpg,{caption}")
    (root / "folder/table.csv").write_text("\n".join(lines))
    Noise(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    return root


SOURCES = {
    "tars": lambda root: TarShards(f"{root}/tars"),
    "array_record": lambda root: ArrayRecords(f"{root}/array_record"),
    "parquet": lambda root: ParquetImages(f"{root}/parquet"),
    "folder": lambda root: Folder(f"{root}/folder"),
    "tfds": lambda root: Tfds("noise", data_dir=f"{root}/tfds"),
}


@pytest.fixture
def store(monkeypatch, data):
    return serve(monkeypatch, data)


def epoch(source, opened) -> list:
    """An epoch's batches from lanes, of chunks of whole row groups."""
    options = ["lanes=2", "chunk=8", "window=2", "rows=4", "caption_rows=2"]
    config = override(tiny_config(), [f"data.{option}" for option in options])
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=source)
    )
    config = override(config, ["train.steps=3"])
    return list(pipeline.train_batches(config, opened))


@pytest.mark.parametrize("kind", SOURCES)
def test_an_epoch_behind_a_url_is_bit_equal_and_read_once(data, store, tmp_path, kind):
    local, remote = SOURCES[kind](data), SOURCES[kind]("store:/")
    cache = LocalCache(tmp_path, 1 << 24)
    here = Opener().open(local)
    there = Opener(cache=cache).open(remote)
    assert len(there) == SHARDS * IMAGES
    assert there.fingerprint() == here.fingerprint()
    expected = epoch(local, here)
    for _ in range(2):
        found = epoch(remote, pickle.loads(pickle.dumps(there)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        store.faults += [AssertionError("it is in the cache")] * 100


@pytest.mark.parametrize("kind", ["tars", "parquet", "folder"])
def test_lanes_read_no_byte_twice_without_a_cache(data, store, kind):
    remote = SOURCES[kind]("store:/")
    opened = Opener().open(remote)
    opened = pickle.loads(pickle.dumps(opened))  # holds nothing of what it indexed
    store.reads.clear()
    store.faults += [Busy()]
    epoch(remote, opened)
    size = sum(f.stat().st_size for f in (data / kind).rglob("*") if f.is_file())
    assert sum(count for *_, count in store.reads) <= 1.05 * size
    by_file: dict[str, list[tuple[int, int]]] = {}
    for file, start, count in store.reads:
        by_file.setdefault(file, []).append((start, start + count))
    for ranges in by_file.values():
        ranges.sort()
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop <= start


@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_files_that_must_be_local_need_a_cache(data, store, kind):
    with pytest.raises(ValueError, match=r"set data\.cache to a folder"):
        Opener().open(SOURCES[kind]("store:/"))


def test_captions_of_single_records_are_cached(data, store, tmp_path):
    source = Opener(cache=LocalCache(tmp_path, 1 << 24)).open(TarShards("store://tars"))
    expected = [source.record(i).captions for i in range(4)]
    store.faults += [AssertionError("it is in the cache")] * 4
    assert [source.record(i).captions for i in range(4)] == expected


def test_parquet_on_a_server_without_ranges_is_not_called_damaged(
    data, store, monkeypatch
):
    async def whole(self, path, start=None, end=None, **options):
        return self._file(path).read_bytes()

    monkeypatch.setattr(store, "_cat_file", whole)
    with pytest.raises(OSError, match="cannot send a part of a file"):
        Opener().open(ParquetImages("store://parquet"))


def test_images_to_embed_are_cached(data, store, tmp_path):
    cache = LocalCache(tmp_path, 1 << 24)
    for arguments in (["store://folder/3.jpg"], ["store://tars/0.tar"]):
        image = images_of(arguments, cache=cache)[0]
        with image.open() as file:
            expected = file.read()
        store.faults += [AssertionError("it is in the cache")]
        with image.open() as file:
            assert file.read() == expected
        store.faults.clear()


def test_each_file_is_asked_for_once(data, store, monkeypatch):
    asked, real = [], store._info

    async def info(self, path, **options):
        asked.append(path)
        return await real(self, path, **options)

    monkeypatch.setattr(store, "_info", info)
    Opener().open(TarShards("store://tars/{0..2}.tar"))
    assert sorted(x for x in asked if x.endswith(".tar")) == [
        f"store://tars/{n}.tar" for n in range(SHARDS)
    ]
