"""navit.train.checks: checks before a run."""

import dataclasses

import pytest
from helpers import tiny_config

from navit.config import Folder, override
from navit.sharding import make_mesh, use_mesh
from navit.sources.source import Record
from navit.sources.synthetic import SyntheticSource
from navit.train import loop
from navit.train.checks import _some_captions, check_devices, check_split


class Counted(SyntheticSource):
    """Notes which records are requested; claims any number of records."""

    def __len__(self) -> int:
        return self.claimed

    def record(self, index: int) -> Record:
        self.asked.append(index)
        return Record(b"", (str(index),))


def test_a_folder_that_is_mostly_held_out_is_warned_about(caplog):
    data = ["data.train=folder:x", "data.train.split=train", "data.eval=folder"]
    config = override(tiny_config(), [*data, "data.eval.split=eval"])
    source = SyntheticSource(size=3)
    check_split(config, source, 3)
    check_split(override(config, ["data.eval.path=y"]), source, 4)
    check_split(override(config, ["data.eval.split=all"]), source, 4)
    assert not caplog.records
    check_split(config, source, 4)
    assert "data.eval.holdout=0.1 takes 4 of 7 images" in caplog.text


@pytest.mark.parametrize("size", [1, 31, 40, 100_000])
def test_captions_are_sampled_in_few_runs_over_the_whole_source(size):
    source = Counted(size=3)
    source.claimed, source.asked = size, []
    assert _some_captions(source) == [str(i) for i in source.asked]
    assert source.asked == sorted(set(source.asked))
    assert source.asked[0] == 0 and source.asked[-1] == size - 1
    assert len(source.asked) == min(size, 256)
    assert len({i // 64 for i in source.asked}) <= 16  # row groups of a Parquet file


def test_captions_that_cannot_be_read_do_not_end_the_start(monkeypatch):
    source, read = SyntheticSource(size=40), SyntheticSource.record

    def record(self, index: int) -> Record:
        if index % 3:
            raise (OSError, ValueError)[index % 2]("unreadable")
        return read(self, index)

    expected = [x for i in range(0, 40, 3) for x in source.record(i).captions]
    monkeypatch.setattr(SyntheticSource, "record", record)
    assert _some_captions(source) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        (["data.rows=3", "mesh.data=8"], "data.rows=3 is not divisible by 8 devices"),
        (["mesh.data=1", "mesh.fsdp=7"], "data.rows=8 is not divisible by 7 devices"),
        (
            ["data.rows=6", "mesh.data=1", "mesh.fsdp=3", "model.text.width=32"],
            "model.text.width=32 cannot be split over mesh.fsdp=3",
        ),
        (
            ["mesh.data=1", "mesh.tensor=2", "model.vision.num_heads=3"],
            "model.vision.num_heads=3 cannot be split over mesh.tensor=2",
        ),
        (["model.attention=splash"], "splash is a TPU kernel, and this runs on a cpu"),
    ],
)
def test_settings_that_the_devices_cannot_share_or_run_are_errors(options, words):
    few = ["data.rows=8", "model.vision.width=24", "model.text.width=24"]
    config = override(tiny_config(), [*few, *options])
    mesh, rules = make_mesh(config.mesh)
    with use_mesh(mesh), pytest.raises(ValueError, match=words):
        check_devices(config, rules)


def test_a_config_is_refused_before_data_is_opened(tmp_path):
    config = override(tiny_config(), ["mesh.data=8", "data.rows=3"])
    nowhere = dataclasses.replace(config.data, train=Folder(str(tmp_path / "no")))
    with pytest.raises(ValueError, match="not divisible by 8 devices"):
        loop.train(dataclasses.replace(config, data=nowhere), tmp_path)
