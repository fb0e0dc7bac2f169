"""Evaluations on data as users have them: parts unreadable, labels of all kinds."""

import dataclasses
import tarfile

import pytest
from flax import nnx
from helpers import tiny_config
from PIL import Image

from navit.config import EvalTask, Folder, Synthetic, override
from navit.embed import Embedder
from navit.evals import budgets
from navit.evals.tasks import open_tasks
from navit.model.two_tower import TwoTower
from navit.sources.synthetic import SyntheticSource

LEARN = Synthetic(size=20, seed=2)


@pytest.fixture(scope="module")
def embedder():
    config = override(tiny_config(), ["eval.budgets=16,16"])  # which is one budget
    return Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=7)


def config_of(embedder, *tasks, data=()):
    config = override(embedder.config, data)
    evaluation = dataclasses.replace(config.eval, tasks=tasks)
    return dataclasses.replace(config, eval=evaluation)


def evaluate(embedder, *tasks, data=()):
    config = config_of(embedder, *tasks, data=data)
    return budgets.evaluate(embedder, config, open_tasks(config)).rows


def pictures(folder, labels, *, cut=()):
    """A folder with a picture for each label (None: no label).

    Args:
      cut: (index, size) of pictures that end after `size` bytes.
    """
    folder.mkdir()
    lines = ["file,caption,label"]
    for i, label in enumerate(labels):
        Image.new("RGB", (40 + i, 30)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,picture {i},{'' if label is None else label}")
    for i, size in cut:
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:size])
    (folder / "t.csv").write_text("\n".join(lines))
    return Folder(str(folder))


def test_a_row_says_how_many_images_each_metric_counted(embedder, tmp_path):
    """Of all images: also those whose header, or only whose pixels, are damaged."""
    labels = ["a", "b", None, "a", "b", "a"]
    source = pictures(tmp_path / "x", labels, cut=[(0, 10), (1, 60)])
    rows = evaluate(
        embedder,
        EvalTask("t", "zero_shot", source=source),
        EvalTask("retrieval", source=source),
    )
    zero_shot, retrieval = rows
    for row in rows:
        assert (row["images"], row["unreadable"]) == (6, 2)
        assert row["source"] == f"folder:{source.path}"
    assert zero_shot["measured"] == {"accuracy": 3, "calibration_error": 3}
    assert {*retrieval["measured"].values()} == {4}


def test_damaged_files_are_noted(embedder, tmp_path):
    pictures(tmp_path / "x", ["a", "b"])
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(2):
            tar.add(tmp_path / f"x/{i}.png", f"{i}.png")
            tar.add(tmp_path / "x/t.csv", f"{i}.txt")
    whole, data = (tmp_path / "x.tar").read_bytes(), [f"data.eval=tars:{tmp_path}"]
    task = EvalTask("retrieval")
    assert evaluate(embedder, task, data=data)[0]["notes"] == []
    (tmp_path / "x.tar").write_bytes(whole.rstrip(b"\0"))
    (row,) = evaluate(embedder, task, data=data)
    assert row["notes"] == [
        "1 file of the data damaged, and used only up to the damage"
    ]


def test_integer_labels_need_names_for_zero_shot(embedder, tmp_path, caplog):
    source = pictures(tmp_path / "x", [0, 2, 1])
    config = config_of(embedder, data=[f"data.eval=folder:{source.path}"])
    assert [each.task.kind for each in open_tasks(config)] == ["retrieval"]
    assert "integers without names: name the classes with --classes" in caplog.text
    with pytest.raises(ValueError, match="integers without names"):
        open_tasks(config, names=["label"])
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    named, _ = open_tasks(config, classes=str(tmp_path / "names.txt"))
    assert named.labels.class_names == ("ant", "bee", "cow")
    # A probe needs no names.
    other = pictures(tmp_path / "y", [1, 2, 0, 0])
    open_tasks(config_of(embedder, EvalTask("knn", source=source, train_source=other)))


def test_a_probe_learns_from_classes_of_the_same_names(embedder, tmp_path):
    """In whatever order; and from all neighbours that it has, if they are few."""
    drawn = SyntheticSource(20, 2).tasks["coarse"]
    labels = [drawn.name(i) for i in range(20)]
    labels += [name for name in drawn.class_names if name not in labels]
    source = pictures(tmp_path / "x", labels)
    task = EvalTask("near", "knn", source=source, train_source=LEARN, k=21)
    (opened,) = open_tasks(config_of(embedder, task))
    assert opened.labels.class_names != drawn.class_names
    names = [opened.labels.class_names[i] for i in opened.train[1]]
    assert names == labels[:20]
    (row,) = evaluate(embedder, task)
    assert "k=20 in place of eval.tasks.near.k=21" in row["notes"][-1]
    few = pictures(tmp_path / "y", ["red", "blue", "mauve"])
    with pytest.raises(ValueError, match=r"train_source lacks mauve and source lacks"):
        open_tasks(config_of(embedder, dataclasses.replace(task, source=few)))
