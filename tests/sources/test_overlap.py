"""navit.sources.overlap: images that training and evaluation both read."""

from pathlib import Path

import pytest

from navit.config import Folder, Mixture, Synthetic, TarShards, Tfds
from navit.sources.overlap import check_overlap

SAMPLE = str(Path(__file__).parents[2] / "data/sample")
FOLDER = f"the folder {SAMPLE}"


def sample(split: str = "all", holdout: float = 0.4, **options) -> Folder:
    return Folder(SAMPLE, split=split, holdout=holdout, **options)


@pytest.mark.parametrize(
    ("train", "evaluation", "shared"),
    [
        (sample(), sample(), FOLDER),
        (sample(), sample(table="captions.csv"), FOLDER),
        (sample(), sample("eval"), FOLDER),
        (sample("train"), sample("train"), FOLDER),
        (Synthetic(9, seed=1), Synthetic(5, seed=1), "synthetic images of seed 1"),
        (Tfds("a", "test"), Tfds("a", "test", caption="text"), "a split=test"),
        (TarShards("s/*.tar"), TarShards("s/*.tar", "json.c"), "s/*.tar"),
        (
            Mixture((sample(), Synthetic(9, seed=1))),
            Mixture((Synthetic(5, seed=2), Synthetic(5, seed=1))),
            "synthetic images of seed 1",
        ),
    ],
)
def test_images_that_both_read_are_named_in_one_line(train, evaluation, shared, caplog):
    check_overlap(train, evaluation)
    (record,) = caplog.records
    assert f"both read {shared}: " in record.getMessage()


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (sample("train"), sample("eval")),
        (sample("eval"), sample("train")),
        (Mixture((sample("train"), Synthetic(9))), sample("eval")),
        (Folder("gone"), sample()),
        (Folder("s3://a/photos"), Folder("s3://b/photos")),  # without listing them
        (Folder("s3://a", "train.csv"), Folder("s3://a", "eval.csv")),
        (Synthetic(9, seed=1), Synthetic(9, seed=2)),
        (Synthetic(9, seed=1), sample()),
        (Tfds("a", "train"), Tfds("a", "test")),
    ],
)
def test_sources_without_common_images_are_not_warned_about(train, evaluation, caplog):
    check_overlap(train, evaluation)
    assert not caplog.records


@pytest.mark.parametrize("split", ["eval", "all"])
@pytest.mark.parametrize("holdout", [0.4, 0.2])
def test_training_on_the_held_out_images_is_refused(split, holdout):
    message = (
        f"data.train.split=eval and data.eval.split={split} .*: set data.train.split="
        "train and data.eval.split=eval"
    )
    for train in (sample("eval"), Mixture((Synthetic(3), sample("eval")))):
        with pytest.raises(ValueError, match=message):
            check_overlap(train, sample(split, holdout))
