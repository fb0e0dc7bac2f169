"""The evaluations of a config: what is measured, kept on disk, and refused."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config
from PIL import Image

import navit
from navit import cli
from navit.config import EvalTask, Folder, MeshConfig, Synthetic, override
from navit.embed import Embedder
from navit.evals import budgets, notes, progress, row_parts, vectors
from navit.evals.probes import Labelled, nearest_neighbours
from navit.evals.tasks import open_tasks
from navit.model.two_tower import TwoTower
from navit.sharding import make_mesh, use_mesh
from navit.sources.synthetic import SyntheticSource

COUNT = 12
LEARN = Synthetic(size=20, seed=2)


@pytest.fixture(scope="module")
def embedder():
    config = tiny_config()
    return Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=7)


def config_of(embedder, *overrides, tasks=()):
    config = override(embedder.config, overrides)
    return dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, tasks=tuple(tasks))
    )


def evaluate(embedder, *overrides, tasks=(), cache=None):
    config = config_of(embedder, *overrides, tasks=tasks)
    opened = open_tasks(config)
    budgets.check(config, opened)
    moved = Embedder(embedder.model, config, step=embedder.step)
    return budgets.evaluate(moved, config, opened, cache=cache)


def by_key(rows):
    return {(row["set"], row["kind"], row["budget"]): row for row in rows}


@pytest.fixture
def reads(monkeypatch):
    """The images that were read for their pixels, in order."""
    seen, real = [], SyntheticSource.record

    def record(self, index):
        seen.append(index)
        return real(self, index)

    monkeypatch.setattr(SyntheticSource, "record", record)
    return seen


ALL = (
    EvalTask("fine", "zero_shot"),
    EvalTask("retrieval"),
    EvalTask("near", "knn", task="coarse", train_source=LEARN, k=3),
    EvalTask("line", "logistic", task="coarse", train_source=LEARN),
)


def test_every_kind_is_measured_at_every_budget(embedder):
    found = evaluate(embedder, tasks=ALL)
    rows = by_key(found.rows)
    assert {*rows} == {(t.name, t.kind, b) for t in ALL for b in (16, 25)}
    for row in found.rows:
        assert row["images"] == COUNT and row["unreadable"] == 0
        assert 0 < row["tokens_per_image"] <= row["budget"]
        assert all(0 <= value <= 1 for value in row["metrics"].values())
        assert row["chance"].keys() <= row["metrics"].keys()
    few, many = (rows["fine", "zero_shot", b]["flops_per_image"] for b in (16, 25))
    assert many > 1.5 * few
    (cascade,) = found.cascades  # only class scores have a confidence
    ends = [cascade["points"][i][1] for i in (0, -1)]
    accuracies = [rows["fine", "zero_shot", b]["metrics"]["accuracy"] for b in (16, 25)]
    assert ends == accuracies
    # A probe, done by hand.
    source, learn = SyntheticSource(COUNT, 1), SyntheticSource(20, 2)
    pooled = [
        embedder.embed_source(s.record, s.sizes, 16, normalized=False).vectors
        for s in (source, learn)
    ]
    labels = [s.tasks["coarse"].labels for s in (source, learn)]
    right = nearest_neighbours(Labelled(pooled[1], labels[1]), pooled[0], k=3)
    near = rows["near", "knn", 16]["metrics"]["accuracy"]
    assert near == round(float((right == labels[0]).mean()), 4)


def test_without_tasks_all_classifications_and_retrieval_are_measured(embedder):
    names = [(each.task.name, each.task.kind) for each in open_tasks(embedder.config)]
    drawn = [(name, "zero_shot") for name in ("coarse", "fine", "finest")]
    assert names == [*drawn, ("retrieval", "retrieval")]
    chosen = open_tasks(embedder.config, names=["fine"])
    assert [each.task.name for each in chosen] == ["fine"]
    chosen = open_tasks(embedder.config, names=["retrieval"])
    assert [each.task.name for each in chosen] == ["retrieval"]


def test_class_names_and_prompts_come_from_files(embedder, tmp_path, caplog):
    source = SyntheticSource(COUNT, 1)
    names = source.tasks["coarse"].class_names
    classes, prompts = tmp_path / "classes.txt", tmp_path / "prompts.txt"
    classes.write_text("\n".join(f"very {name}" for name in names))
    prompts.write_text("a {}\nthe {c}\n")
    task = EvalTask(
        "t", "zero_shot", task="coarse", classes=str(classes), prompts=str(prompts)
    )
    (opened,) = open_tasks(config_of(embedder, tasks=[task]))
    assert opened.labels.class_names == tuple(f"very {name}" for name in names)
    assert opened.prompts == ("a {}", "the {}")
    classes.write_text("owl\nwren\n")
    with pytest.raises(ValueError, match=rf"has 2 .* the labels {len(names)} classes"):
        open_tasks(config_of(embedder, tasks=[task]))
    classes.write_text("\n".join(["owl", "owl", *names[2:]]))
    open_tasks(config_of(embedder, tasks=[task]))
    assert "1 class names are repeated" in caplog.text
    classes.write_text("\n".join(f"very {name}" for name in names))
    task = dataclasses.replace(task, per_class=True)
    row = evaluate(embedder, "eval.budgets=16", tasks=[task]).rows[0]
    labels = source.tasks["coarse"].labels
    assert row["notes"] == [*row["notes"][:-1], "2 prompts for each class"]
    assert {*row["per_class"]} == {f"very {names[i]}" for i in {*labels.tolist()}}
    counts = np.bincount(labels, minlength=len(names))
    mean = sum(
        row["per_class"][f"very {names[i]}"]["accuracy"] * counts[i]
        for i in np.flatnonzero(counts)
    )
    assert sum(x["images"] for x in row["per_class"].values()) == COUNT
    assert row["metrics"]["accuracy"] == pytest.approx(mean / COUNT, abs=1e-3)


def test_nothing_is_embedded_twice(embedder, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "_TIMED", COUNT)
    task = EvalTask("coarse", "zero_shot")
    options = ["eval.budgets=16", "data.eval.size=12"]
    fresh = evaluate(embedder, *options, tasks=[task])
    assert sorted(reads) == [*range(COUNT)]
    few = evaluate(embedder, *options, "eval.max_images=8", tasks=[task])
    assert few.rows[0]["images_per_second"] is None
    kept = evaluate(embedder, *options, tasks=[task], cache=tmp_path)
    reads.clear()
    again = evaluate(embedder, *options, tasks=[task], cache=tmp_path)
    assert reads == []
    other = EvalTask("line", "logistic", task="coarse", train_source=LEARN)
    evaluate(embedder, *options, tasks=[other], cache=tmp_path)
    assert sorted(reads) == [*range(20)]  # what the probe learns from
    assert fresh.rows[0]["metrics"] == kept.rows[0]["metrics"]
    assert again.rows[0]["metrics"] == kept.rows[0]["metrics"]
    assert kept.rows[0]["images_per_second"] > 0
    assert again.rows[0]["images_per_second"] is None
    # Another budget, other preprocessing, other weights.
    for change in ("eval.budgets=9", "data.dct=accurate"):
        reads.clear()
        evaluate(embedder, *options, change, tasks=[task], cache=tmp_path)
        assert sorted(reads) == [*range(COUNT)]
    reads.clear()
    retrained = jax.tree.map(lambda x: x + 0.01, embedder.model)
    moved = Embedder(retrained, embedder.config, step=7)
    evaluate(moved, *options, tasks=[task], cache=tmp_path)
    assert sorted(reads) == [*range(COUNT)]


def test_the_vectors_used_longest_ago_make_room(embedder, reads, tmp_path, caplog):
    """But never those of the present evaluation, whatever they take."""
    caplog.set_level("INFO", "navit")
    tasks = [EvalTask("coarse", "zero_shot")]

    def embedded(budgets, gib):
        reads.clear()
        options = [f"eval.budgets={budgets}", f"eval.cache_gib={gib}"]
        evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
        return len(reads) // COUNT

    (tmp_path / "notes").mkdir()  # not ours
    (tmp_path / "notes/a.txt").write_text("a")
    assert embedded("9", 1) == 1
    each = sum(x.stat().st_size for x in tmp_path.glob("9-*/*")) / 2**30
    for number, budget in enumerate((16, 25, 9)):
        assert embedded(f"{budget}", 1) == (budget != 9)
        (folder,) = tmp_path.glob(f"{budget}-*")
        os.utime(folder, (number, number))
    # Room for three: of 16, 25 and 9, the first was used longest ago.
    assert "removed" not in caplog.text
    assert embedded("4", 3.5 * each) == 1
    assert re.search(r"removed \d+ kB .*eval.cache_gib=", caplog.text)
    kept = {int(path.name.partition("-")[0]) for path in tmp_path.glob("*-*")}
    assert kept == {25, 9, 4}
    caplog.clear()
    assert embedded("4,9,16", 0.5 * each) == 1
    assert "more than eval.cache_gib=" in caplog.text
    kept = {int(path.name.partition("-")[0]) for path in tmp_path.glob("*-*")}
    assert kept == {4, 9, 16}
    assert (tmp_path / "notes/a.txt").read_text() == "a"


def test_the_same_weights_in_any_format_are_the_same(embedder, tmp_path):
    expected = vectors.fingerprint(embedder)
    for name, format in (("a", "huggingface"), ("b.npz", "big_vision"), ("c", "navit")):
        navit.save(embedder, tmp_path / name, format=format)
        options = ["model.dtype=bfloat16", "model.attention=xla", "model.fused=false"]
        if name == "b.npz":  # it has no place for the tokenizer
            options.append("model.text.tokenizer=bytes")
        found = navit.load(tmp_path / name, overrides=options)
        assert vectors.fingerprint(found) == expected
    nearly = jax.tree.map(lambda x: x, embedder.model)
    nearly.scale[...] += 1e-6
    heads = override(embedder.config, ["model.vision.num_heads=1"])
    for other in (
        Embedder(nearly, embedder.config, step=7),
        Embedder(embedder.model, heads, step=7),
    ):
        assert vectors.fingerprint(other) != expected


def test_vectors_that_are_not_finite_are_an_error(embedder, tmp_path):
    """They are not taken for unreadable images, nor kept."""
    model = jax.tree.map(lambda x: x * np.nan, embedder.model)
    broken = Embedder(model, embedder.config, step=7)
    with pytest.raises(FloatingPointError, match=r"12 of 12 images .* at 16 tokens"):
        evaluate(broken, tasks=[EvalTask("fine", "zero_shot")], cache=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["zero_shot", "knn"])
def test_results_on_other_labels_are_other_results(embedder, kind):
    """Under one name too: neither replaces the other in the table."""
    learn = LEARN if kind == "knn" else None
    settings = []
    for name in ("coarse", "fine"):
        task = EvalTask("t", kind, task=name, train_source=learn, k=3)
        config = config_of(embedder, tasks=[task])
        (opened,) = open_tasks(config)
        settings.append(row_parts.settings(config, opened))
    assert settings[0] != settings[1]


def test_other_files_of_the_same_names_and_sizes_are_embedded(embedder, tmp_path):
    """Such as the corruptions of a test set, each in a folder of its own."""
    tasks = [EvalTask("label", "zero_shot")]
    rng = np.random.default_rng(0)
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "0.png")
        (folder / "t.csv").write_text("file,label\n0.png,a\n")
        options = ["eval.budgets=16", f"data.eval=folder:{folder}"]
        evaluate(embedder, *options, tasks=tasks, cache=tmp_path / "kept")
        kept = sorted((tmp_path / "kept").glob("*/*.npy"))
        different = {np.load(file).tobytes() for file in kept}
    assert len(kept) == len(different) == 3


def test_an_interrupted_evaluation_goes_on_where_it_was(
    embedder, reads, tmp_path, monkeypatch
):
    monkeypatch.setattr(vectors, "_PART", 5)
    options = ["eval.budgets=16"]
    tasks = [EvalTask("coarse", "zero_shot")]
    expected = evaluate(embedder, *options, tasks=tasks)
    reads.clear()
    real = SyntheticSource.record

    def dying(self, index):
        if index == 8:
            raise MemoryError("killed")
        return real(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSource, "record", dying)
        with pytest.raises(MemoryError):
            evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
    reads.clear()
    found = evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
    assert sorted(reads) == [*range(5, COUNT)]
    assert found.rows[0]["metrics"] == expected.rows[0]["metrics"]
    # A damaged part is embedded again, and only that one.
    (part,) = tmp_path.glob("*/5-10.npy")
    part.write_bytes(part.read_bytes()[:100])
    reads.clear()
    evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
    assert sorted(reads) == [*range(5, 10)]


def test_ctrl_c_says_what_is_kept(embedder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "navit")
    monkeypatch.setattr(vectors, "_PART", 5)
    options, tasks = ["eval.budgets=16"], [EvalTask("coarse", "zero_shot")]
    real, calls = Embedder.embed_source, []

    def stopped(self, *args, **others):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_source", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
    assert caplog.messages[-2:] == [
        "12 images at 16 tokens",
        "kept 5 of 12 images at 16 tokens; the same command goes on there",
    ]
    for kept in ("(5 kept, 7 to embed)", "(all kept)"):
        caplog.clear()
        evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
        assert caplog.messages[0] == f"12 images at 16 tokens {kept}"


def test_a_log_file_shows_progress(embedder, monkeypatch, caplog):
    caplog.set_level("INFO", "navit")
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    evaluate(embedder, "eval.budgets=16", tasks=[EvalTask("coarse", "zero_shot")])
    said = [x for x in caplog.messages if "ETA" in x]
    assert len(said) == COUNT
    line = r"12 of 12 images  \d+\.\d images/s  ETA 0 s"
    assert any(re.fullmatch(line, x) for x in said)


def test_an_unreadable_image_is_tried_again(embedder, tmp_path, monkeypatch, caplog):
    tasks, options = [EvalTask("coarse", "zero_shot")], ["eval.budgets=16"]
    whole = evaluate(embedder, *options, tasks=tasks)
    real = SyntheticSource.record

    def failing(self, index):
        if index == 3:
            raise OSError("storage is away")
        return real(self, index)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(SyntheticSource, "record", failing)
            caplog.clear()
            found = evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
        assert found.rows[0]["unreadable"] == 1
        assert "storage is away" in caplog.text
    found = evaluate(embedder, *options, tasks=tasks, cache=tmp_path)
    assert found.rows[0]["unreadable"] == 0
    assert found.rows[0]["metrics"] == whole.rows[0]["metrics"]


def test_eight_devices_equal_one(embedder, tmp_path):
    """From a work directory, as the command does it, with an unreadable image."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,caption,label"]
    for i in range(11):
        size = tuple(int(x) for x in rng.integers(20, 90, 2))
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
        lines.append(f"{i}.png,picture {i},{'cat' if i % 2 else 'dog'}")
    broken = (data / "4.png").read_bytes()
    (data / "4.png").write_bytes(broken[:60])  # its header is whole
    (data / "table.csv").write_text("\n".join(lines))
    workdir = tmp_path / "run"
    navit.save(embedder, workdir, format="navit")
    source = Folder(str(data))
    config = override(embedder.config, ["eval.budgets=25"])
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=Synthetic(9), eval=source)
    )
    classes, prompts = tmp_path / "classes.txt", tmp_path / "prompts.txt"
    classes.write_text("a black cat\na white dog\n")
    prompts.write_text("{} in a room\n")
    config = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, prompts=("{} in a room",))
    )
    opened = open_tasks(config, classes=str(classes))
    one = budgets.evaluate(Embedder(embedder.model, config, step=0), config, opened)
    command = ["eval", str(workdir), "--budgets", "25", f"data.eval=folder:{data}"]
    command += ["--classes", str(classes), "--prompts", str(prompts)]
    assert cli.main(command) == 0
    rows = json.loads((workdir / "budgets.json").read_text())["rows"]
    kinds = ("label", "zero_shot"), ("retrieval", "retrieval")
    expected = by_key(one.rows)
    assert {*by_key(rows)} == {(*x, 25) for x in kinds}
    for key, row in by_key(rows).items():
        assert row["unreadable"] == 1 and row["images"] == 11
        assert row["metrics"] == pytest.approx(expected[key]["metrics"], abs=1e-4)
        assert row["settings"] == expected[key]["settings"]
    mesh, rules = make_mesh(MeshConfig())
    assert mesh.size == 8
    with use_mesh(mesh):
        split = navit.load(workdir, rules=rules)
        pictures = [np.asarray(Image.open(data / f"{i}.png")) for i in (0, 1, 2)]
        z = split.embed_images(pictures, 25)
    np.testing.assert_allclose(z, embedder.embed_images(pictures, 25), atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([EvalTask("t", "zero_shot", classes="no.txt")], ["no file", "no.txt"]),
        ([EvalTask("t", "zero_shot", prompts="PROMPTS")], ["'a photo'", "0 places"]),
        ([EvalTask("t", "zero_shot", task="fin")], ["'fin'", "did you mean 'fine'"]),
        ([EvalTask("classification")], ["7 classes", "knn"]),
        (
            [EvalTask("knn", train_source=Synthetic(size=12, seed=1))],
            ["'knn' would learn from", "12 images", "train_source"],
        ),
        ([EvalTask("zero_shot", source=Folder("CAPTIONS"))], ["no labels", "label"]),
        ([EvalTask("t", "knn", source=Folder("EMPTY"))], ["eval", "no image"]),
        ([EvalTask("t", "retrieval", source=Folder("LOST"))], ["lost.png"]),
    ],
)
def test_data_that_lack_what_an_evaluation_needs_are_named(
    embedder, tmp_path, tasks, words, monkeypatch
):
    (tmp_path / "PROMPTS").write_text("a photo\n")
    tables = {
        "CAPTIONS": "file,caption\n0.png,a cat\n1.png,a dog\n2.png,a cat",
        "EMPTY": "file,label\n0.png,a\n1.png,b\n2.png,a",
        "LOST": "file,caption\n0.png,a cat\nlost.png,a dog",
    }
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.csv").write_text(table)
        for i in range(3):
            Image.new("RGB", (30, 20)).save(tmp_path / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    if tasks[0].source == Folder("EMPTY"):
        source = Folder("EMPTY", split="eval", holdout=1e-6)
        tasks = [dataclasses.replace(tasks[0], source=source)]
    with pytest.raises((ValueError, OSError)) as error:
        evaluate(embedder, "eval.budgets=16", tasks=tasks)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_prompts_of_the_command_are_for_zero_shot(embedder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a {}\nthe {}\n")
    config = config_of(embedder, tasks=[EvalTask("fine", "zero_shot"), ALL[1]])
    fine, retrieval = open_tasks(config, prompts=str(path))
    assert fine.prompts == ("a {}", "the {}") and retrieval.prompts == ()
    with pytest.raises(ValueError, match="there is none"):
        open_tasks(config, names=["retrieval"], prompts=str(path))


def test_an_unknown_task_is_an_error_with_the_nearest_name(embedder):
    with pytest.raises(ValueError, match=r"no task 'fin'; did you mean 'fine'\?"):
        open_tasks(embedder.config, names=["fin"])
    config = config_of(embedder, tasks=ALL)
    with pytest.raises(ValueError, match=r"eval.tasks has no task 'neer'.*'near'"):
        open_tasks(config, names=["neer"])
    with pytest.raises(ValueError, match=r"there are 3 \(coarse, fine, finest\)"):
        open_tasks(embedder.config, classes="names.txt")


@pytest.mark.parametrize(
    ("change", "trained", "step", "words"),
    [
        ((), (), 7, []),
        ((), ("data.budgets=9",), 7, ["never trained at 16 tokens, but at 9"]),
        ((), ("data.budgets=9",), 0, ["do not say at which budgets"]),
        ((), ("data.sides.low=64", "data.sides.high=65"), 7, []),
        ((), ("data.sides.low=96", "data.sides.high=100"), 7, ["but at 36 to 39"]),
        (
            ("model.vision.fixed_grid=true",),
            ("model.vision.fixed_grid=true",),
            7,
            ["one fixed resolution"],
        ),
        ((), ("model.vision.fixed_grid=true",), 7, ["trained at one fixed resolution"]),
        (
            ("data.square=true",),
            (),
            7,
            ["trained with each image with its aspect, and evaluated as a square"],
        ),
        (
            ("model.text.tokenizer=a.model",),
            ("model.text.tokenizer=b.model",),
            7,
            ["tokenizer a.model, and the weights have b.model"],
        ),
        ((), ("model.text.tokenizer=none",), 7, ["do not say which one"]),
    ],
)
def test_differences_from_training_are_noted(embedder, change, trained, step, words):
    trained = override(embedder.config, trained)
    config = override(embedder.config, change)
    found = notes.notes(config, trained, 16, step=step)
    assert len(found) == len(words)
    for note, word in zip(found, words, strict=True):
        assert word in note


def test_a_page_has_the_grid_of_the_rule(embedder):
    page = notes.pages(embedder.config, 256)[0]
    assert page.grid == navit.grid_for(2200, 1700, max_tokens=256)
    assert page.pixels == (page.grid[0] * 16, page.grid[1] * 16)
    assert page.dpi == round(page.pixels[0] / 11)
