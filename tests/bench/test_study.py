"""navit.bench.study: equal compute, resuming, and the summary over seeds."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config

from navit.bench import study, study_report
from navit.config import Classification, Study, TokenDrop, override, run_file
from navit.input import pipeline
from navit.model import flops
from navit.train.interruption import Outcome

STUDIES = sorted((Path(__file__).parents[2] / "configs/studies").glob("*.py"))

FILE = """
from helpers import tiny_config
from navit.config import Study, override

def get_study():
    config = tiny_config(checkpoint_every=100)
    other = override(config, ["data.budgets=9", "optim.lr={lr}"])
    return Study("Two", {{"both": config, "small": other}}, (2e7,), seeds=(0, 1))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a study and, in `out`, its results after an interrupted start."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "two.py").write_text(FILE.format(lr=1e-3))
    train, trained = study.loop.train, []

    def stopped(config, workdir):
        trained.append(workdir.name)
        if len(trained) < 3:
            return train(config, workdir)
        return Outcome.INTERRUPTED

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.loop, "train", stopped)
        assert run(folder) == 130
        assert not (folder / "out/results.json").exists()
        patch.setattr(study.loop, "train", lambda *a: trained.append("") or train(*a))
        assert run(folder, "--plot") == 0
    assert len(trained) == 3 + 2  # the third again, and the fourth
    return folder


def test_after_a_platforms_notice_the_exit_code_is_0(tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(FILE.format(lr=1e-3))
    monkeypatch.setattr(study.loop, "train", lambda *_: Outcome.PREEMPTED)
    assert run(tmp_path) == 0
    assert not (tmp_path / "out/results.json").exists()


def run(folder: Path, *options: str) -> int:
    out = ["--out", str(folder / "out"), *options]
    return study.main([str(folder / "two.py"), *out])


def test_a_study_trains_every_config_with_every_seed(finished):
    results = json.loads((finished / "out/results.json").read_text())
    ran = [(x["name"], x["seed"]) for x in results["runs"]]
    assert ran == [("both", 0), ("small", 0), ("both", 1), ("small", 1)]
    for result in results["runs"]:
        assert result["config"]["train"]["seed"] == result["seed"]
        assert result["config"]["data"]["seed"] == result["seed"]
        assert result["config"]["train"]["steps"] == result["steps"]
        assert {row["budget"] for row in result["rows"]} == {16, 25}
    for line in results["summary"]:
        assert line["seeds"] == 2 and 0 <= line["mean"] <= 1
    table = (finished / "out/results.md").read_text()
    assert "| both |" in table and "±" in table and "2 seeds" in table
    assert (finished / "out/results.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_study_trains_nothing(finished, monkeypatch, capsys):
    monkeypatch.setattr(study.loop, "train", None)
    assert run(finished) == 0
    assert capsys.readouterr().out.count("is finished") == 4


def test_a_run_with_another_config_is_not_taken_for_finished(finished, tmp_path):
    (tmp_path / "two.py").write_text(FILE.format(lr=2e-3))
    (tmp_path / "out").symlink_to(finished / "out")
    with pytest.raises(
        ValueError, match=r"small-2e\+07-seed0 was trained with another"
    ):
        run(tmp_path)


@pytest.mark.parametrize("drop", [None, TokenDrop(rate=0.6, final_rate=0.2)])
@pytest.mark.parametrize("classifies", [False, True])
def test_the_planned_compute_is_that_of_the_batches(classifies, drop):
    config = tiny_config()
    if classifies:
        config = override(config, ["model.vision.num_classes=7"])
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, text=None),
            train=dataclasses.replace(config.train, losses=(Classification(),)),
        )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, drop=drop)
    )
    source = pipeline.open_source(config.data.train)
    spent = study.steps_for(config, source, 6e6)
    config = override(config, [f"train.steps={spent.steps}"])
    total = images = 0
    for batch in pipeline.train_batches(config, source):
        counts = [np.bincount(row[row > 0]) for row in batch.images.segment_ids]
        lengths = np.concatenate(counts)
        n = int((lengths > 0).sum())
        texts = {} if classifies else {"captions": n, "pairs": n * n}
        before, images = total, images + n
        counted = flops.Counts(int(lengths.sum()), int((lengths**2).sum()), n, **texts)
        total += flops.train_step(config, counted).total
    assert (spent.flops, spent.images) == (total, images)
    assert before < 6e6 <= total


def test_the_summary_has_the_mean_and_its_standard_error():
    def result(name, seed, accuracy):
        row = {"set": "fine", "budget": 64, "metrics": {"accuracy": accuracy}}
        rows = [{**row, "chance": {"accuracy": 0.2}}, {**row, "metrics": {}}]
        spent = {"target_flops": 1e9, "images": 100 + seed, "seconds": 2.0}
        return {"name": name, "seed": seed, **spent, "rows": rows}

    values = [0.5, 0.6, 0.9]
    results = [result("a", i, x) for i, x in enumerate(values)] + [result("b", 0, 0.3)]
    a, b = study_report.summarize(results)
    assert a.mean == pytest.approx(np.mean(values))
    assert a.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert (a.seeds, a.images, a.chance) == (3, 101, 0.2)
    assert (b.mean, b.error, b.seeds) == (0.3, None, 1)
    table = study_report.markdown(Study("T", {"a": tiny_config()}, (1e9,)), [a, b])
    assert "| 66.7 ± 12.0 % |" in table and "| 30.0 % |" in table


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_repository_has_equal_compute(path):
    whole = run_file(path, "get_study", Study)
    small = {
        name: override(config, ["data.train.size=300"])
        for name, config in whole.configs.items()
    }
    runs = list(study.planned(dataclasses.replace(whole, configs=small, flops=(3e10,))))
    assert len(runs) == len(whole.configs) * len(whole.seeds)
    for each in runs:
        # The last batch goes beyond the target.
        assert 3e10 <= each.spent.flops < 3.8e10, each.name
        assert each.config.train.steps == each.spent.steps


def test_a_study_without_compute_is_refused():
    with pytest.raises(ValueError, match="positive FLOPs"):
        Study("T", {"a": tiny_config()}, (0.0,))
    with pytest.raises(ValueError, match="configs and seeds"):
        Study("T", {}, (1.0,))


def test_a_study_without_an_accuracy_is_refused():
    row = {"set": "captions", "budget": 9, "metrics": {"image_to_text_r1": 0.5}}
    with pytest.raises(
        ValueError, match="no evaluation of the study measures accuracy"
    ):
        study_report.summarize([{"name": "a", "target_flops": 1.0, "rows": [row]}])
