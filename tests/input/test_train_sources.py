"""Training and evaluation on each kind of source in files."""

import csv
import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import tiny_config

import navit
from navit.config import Folder, Mixture, TarShards, Tfds
from navit.evals import budgets
from navit.evals.tasks import open_tasks
from navit.input import pipeline
from navit.sources.kinds import open_source
from navit.train import loop

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))


class Pairs(tfds.core.GeneratorBasedBuilder):
    """The sample with a caption each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        classes = sorted({row["label"] for row in ROWS})
        features = {
            "image": tfds.features.Image(),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=classes),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row in ROWS:
            image = io.BytesIO((SAMPLE / row["file"]).read_bytes())
            yield (
                row["file"],
                {
                    "image": image,
                    "caption": row["caption"],
                    "label": row["label"],
                },
            )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("sources")
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for row in ROWS[shard::2]:
                tar.add(SAMPLE / row["file"], row["file"])
                key = Path(row["file"]).stem
                for suffix in ("txt", "cls"):
                    text = row["caption"] if suffix == "txt" else str(shard)
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text.encode()))
    Pairs(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    tar = TarShards(f"{root}/{{00000..00001}}.tar")
    prepared = Tfds("pairs", data_dir=str(root / "tfds"))
    mixture = Mixture((tar, Folder(str(SAMPLE))), (1.0, 2.0))
    return {"tar": tar, "tfds": prepared, "mixture": mixture}


def configured(source, **data):
    config = tiny_config(steps=3, log_every=1, checkpoint_every=3)
    data = dataclasses.replace(config.data, train=source, eval=None, **data)
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory) -> Path:
    """The work directory of a run on tar shards, evaluated on the sample."""
    workdir = tmp_path_factory.mktemp("run") / "tar"
    config = configured(sources["tar"])
    held = dataclasses.replace(config.data, eval=Folder(str(SAMPLE)))
    config = dataclasses.replace(config, data=held)
    assert loop.train(config, workdir)
    assert loop.train(config, workdir)  # the same data: it resumes
    return workdir


def test_a_run_trains_evaluates_and_resumes(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert (trained / "budgets.json").stat().st_size > 0


@pytest.mark.parametrize("kind", ["tar", "tfds", "mixture"])
def test_other_sources_give_batches_again_and_are_evaluated(sources, trained, kind):
    config = configured(sources[kind])
    first, again = (open_source(sources[kind]) for _ in range(2))
    # A run resumes with data of the same fingerprint, at any step.
    found = [pipeline.fingerprint(x, config.data) for x in (first, again)]
    assert found[0] == found[1]
    batches = list(pipeline.train_batches(config, first))
    rest = list(pipeline.train_batches(config, again, start_step=1))
    assert len(batches) == 3
    same_batches(batches[1:], rest)
    opened = open_tasks(config)
    budgets.check(config, opened, first)
    found = budgets.evaluate(navit.load(trained), config, opened)
    assert {row["images"] for row in found.rows} == {len(opened[0].images.source)}
    assert all(row["unreadable"] == 0 and row["metrics"] for row in found.rows)


def same_batches(some, others):
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.images.patches, other.images.patches)
        np.testing.assert_array_equal(one.text, other.text)
        assert (one.id >= 0).any()


@pytest.mark.parametrize("kind", ["tar", "tfds"])
def test_workers_read_what_this_process_reads(sources, kind):
    """The source goes to another process and opens its files there."""
    config = configured(sources[kind], workers=0)
    source = pipeline.open_source(config.data.train)
    here = list(pipeline.train_batches(config, source))
    data = dataclasses.replace(config.data, workers=1)
    there = pipeline.train_batches(dataclasses.replace(config, data=data), source)
    same_batches(here, there)
    there.close()
