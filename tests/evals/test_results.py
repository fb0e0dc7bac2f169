"""The table of results grows, whoever writes to it."""

import csv
import json
import threading

import pytest
from matplotlib.figure import Figure

from navit.evals import figure, notes, results, tables


def row(step=1, budget=16, *, speed=2.5, **others):
    return {
        "step": step,
        "weights": "w",
        "set": "coarse",
        "kind": "zero_shot",
        "budget": budget,
        "images": 3,
        "unreadable": 0,
        "tokens_per_image": 15.5,
        "enlarged": 0.25,
        "flops_per_image": 10**9 * budget,
        "images_per_second": speed,
        "metrics": {"accuracy": 0.5, "calibration_error": 0.123},
        "chance": {"accuracy": 0.25},
        "notes": [],
        "data": "three images",
        "measured": {"accuracy": 3, "calibration_error": 3},
        "settings": {"dct": "fast"},
        "source": "folder:pets",
        "model": "run",
        "date": "2026-01-01",
        **others,
    }


def pages_at(budget):
    return [notes.Page("letter page", budget, (5, 4), (80, 64), 7)]


CASCADE = {
    **{name: row()[name] for name in ("step", "weights", "set", "kind", "images")},
    **{name: row()[name] for name in ("data", "settings", "date", "source", "model")},
    "small": 16,
    "large": 64,
    "points": [(i / 20, 0.5 + i / 100, 1e9 * i) for i in range(21)],
}


def test_rows_are_added_by_step_and_budget(tmp_path):
    results.write(tmp_path, [row(), row(2)], [CASCADE], pages_at)
    results.write(tmp_path, [row(2, 64)], [], pages_at)
    rows, cascades = results.write(tmp_path, [row(1, 64)], [CASCADE], pages_at)
    assert [(x["step"], x["budget"]) for x in rows] == [
        (1, 16),
        (1, 64),
        (2, 16),
        (2, 64),
    ]
    assert len(cascades) == 1
    stored = results.read(tmp_path / "budgets.json")
    assert stored["rows"] == rows and len(stored["cascades"]) == 1
    with (tmp_path / "budgets.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["budget"] for line in lines] == ["16", "64", "16", "64"]
    assert {line["accuracy"] for line in lines} == {"0.5"}
    assert {line["chance_accuracy"] for line in lines} == {"0.25"}
    text = (tmp_path / "budgets.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block[0] == "|"]
    # Four rows and chance, a cascade, and a page at each budget.
    assert [len(table) - 2 for table in tables] == [5, 1, 2]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_only_the_same_evaluation_replaces_a_row(tmp_path):
    results.write(tmp_path, [row()], [], pages_at)
    # Nothing was embedded this time: the speed of before stays.
    rows, _ = results.write(
        tmp_path, [row(speed=None, date="2026-02-02")], [], pages_at
    )
    assert [x["date"] for x in rows] == ["2026-02-02"]
    assert rows[0]["images_per_second"] == 2.5
    others = [
        row(weights="v"),
        row(data="other images"),
        row(settings={"dct": "accurate"}),
        row(images=2),
    ]
    rows, _ = results.write(tmp_path, others, [], pages_at)
    assert len(rows) == 5


def test_a_table_of_an_earlier_version_is_kept(tmp_path):
    values = {"tokens_per_image": 15.5, "images_per_second": 3.0, "unreadable": 1}
    old = {
        "step": 4,
        "date": "2025-12-31",
        "navit": "0.1.0",
        "data": {"type": "DataConfig"},
        "images": 17,
        "chance": {"label_accuracy": 0.5, "image_to_text_r1": 0.1},
        "budgets": {
            "64": {**values, "label_accuracy": 0.75, "image_to_text_r1": 0.5},
            "100": {**values, "label_accuracy": 0.8, "image_to_text_r1": 0.6},
        },
    }
    (tmp_path / "budgets.json").write_text(json.dumps(old))
    for _ in range(2):
        rows, _ = results.write(tmp_path, [row(4, 64)], [], pages_at)
        assert [(x["set"], x["budget"]) for x in rows] == [
            ("coarse", 64),
            ("data.eval", 64),
            ("data.eval", 100),
        ]
    assert rows[2]["metrics"] == {"label_accuracy": 0.8, "image_to_text_r1": 0.6}
    assert rows[2]["unreadable"] == 1 and rows[2]["images"] == 17
    text = (tmp_path / "budgets.md").read_text()
    assert "| label_accuracy | image→text R@1 |" in text
    assert "| 80.0% | 60.0% |" in text and "| 50.0% | 10.0% |" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"budgets": {"64": {}}}'])
def test_a_file_that_is_no_table_is_not_overwritten(tmp_path, content):
    (tmp_path / "budgets.json").write_text(content)
    with pytest.raises(ValueError, match=r"budgets.json is not a table"):
        results.write(tmp_path, [row()], [], pages_at)
    assert (tmp_path / "budgets.json").read_text() == content


def test_no_row_is_lost_between_writers(tmp_path):
    def write(first):
        for step in range(first, first + 10):
            results.write(tmp_path, [row(step)], [], pages_at)

    threads = [threading.Thread(target=write, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = results.read(tmp_path / "budgets.json")["rows"]
    assert [x["step"] for x in rows] == [*range(40)]


def test_the_text_has_a_line_for_every_row_and_each_note_once():
    note = "never trained at 64 tokens, but at 16"
    rows = [row(), row(budget=64, notes=[note]), row(budget=65, notes=[note])]
    rows[1] |= {"unreadable": 2, "measured": {"accuracy": 1}}
    lines = tables.text(rows, [CASCADE]).splitlines()
    assert lines[0].split()[:4] == ["set", "kind", "tokens", "used"]
    assert lines[0].split()[-2:] == ["accuracy", "ECE"]
    assert [line.split()[2] for line in lines[1:5]] == ["16", "64", "65", "chance"]
    assert lines[1].split()[-2:] == ["50.0%", "0.123"]
    assert "1 of 3 (2 unreadable)" in lines[2]
    assert lines[4].split()[-1] == "25.0%"
    assert lines[6].startswith("cascade") and "16→64" in lines[7]
    assert "50.0% (0)" in lines[7] and "70.0% (20)" in lines[7]
    assert lines[8:] == [f"note: {note}"]


def test_rows_of_other_data_can_be_told_apart():
    rows = [
        row(),
        row(settings={"labels": "x"}, classes="colours.txt"),
        row(settings={"prompts": "x"}, prompts="photos.txt"),
        row(step=0, weights="v", model="released", source="tars:x.tar"),
    ]
    lines = tables.markdown(rows, [CASCADE | rows[1]], []).splitlines()
    cells = [line.split(" | ")[2:5] for line in lines if line.startswith("| coarse |")]
    assert [x for x in cells if x[0]] == [
        ["folder:pets", "run", "1"],
        ["folder:pets, classes colours.txt", "run", "1"],
        ["folder:pets, prompts photos.txt", "run", "1"],
        ["tars:x.tar", "released", "-"],
    ]
    assert "| coarse, zero_shot | folder:pets, classes colours.txt |" in lines[-1]


def test_the_terminal_names_the_classes_with_the_lowest_accuracy():
    classes = {
        f"c{i}": {"accuracy": i / 10, "images": i + 1} for i in (3, 0, 2, 5, 4, 1)
    }
    text = tables.text([row(per_class=classes)], [])
    assert text.endswith(
        "lowest of coarse at 16 tokens: c0 0.0% of 1, c1 10.0% of 2, c2 20.0% of 3, "
        "c3 30.0% of 4, c4 40.0% of 5"
    )


def recalls(**others):
    values = {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25}
    return row(set="retrieval", kind="retrieval", metrics=values, **others) | {
        "chance": dict.fromkeys(values, 0.1),
        "measured": {"image_to_text_r1": 2, "text_to_image_r1": 7},
    }


def test_retrieval_has_a_table_of_its_own():
    first, other = tables.text([row(), recalls()], []).split("\n\n")
    assert "accuracy" in first and "R@1" not in first
    assert other.splitlines()[0].endswith("image→text R@1  text→image R@1")
    assert "2 of 3, 7 texts" in other.splitlines()[1]
    assert other.splitlines()[2].split()[2:] == ["chance", "10.0%", "10.0%"]


@pytest.fixture
def drawn(monkeypatch):
    """Draws, and returns the lines (x and y), the texts and the legend of the plot."""

    def draw(rows, cascades):
        kept = []
        monkeypatch.setattr(
            Figure, "savefig", lambda self, file, **_: kept.append(self)
        )
        figure.plot(rows, cascades)
        by_tokens, by_flops = kept[0].axes
        lines = [
            [
                [*map(float, line.get_xdata())]
                for line in axes.lines
                if len(line.get_xdata())
            ]
            for axes in (by_tokens, by_flops)
        ]
        (legend,) = kept[0].legends
        texts = [text.get_text() for text in by_tokens.texts]
        return lines, texts, [text.get_text() for text in legend.get_texts()]

    return draw


def test_the_plot_is_a_picture():
    rows = [row(), row(budget=64), recalls(), recalls(budget=64)]
    assert figure.plot(rows, [CASCADE]).startswith(b"\x89PNG")
    assert figure.plot([row(step=0, metrics={})], []).startswith(b"\x89PNG")


def test_a_line_joins_only_results_of_the_same_images_and_settings(drawn):
    rows = [row(budget=b) for b in (16, 64, 256)]
    rows += [row(budget=b, data="others", source="tars:x") for b in (16, 32)]
    rows += [row(budget=64, settings={"labels": "x"}, classes="colours.txt")]
    rows += [row(budget=b, settings={"dct": "accurate"}) for b in (32, 64)]
    (by_tokens, by_flops), texts, legend = drawn(rows, [])
    assert sorted(x for x in by_tokens if x != [0, 1]) == sorted(
        [[16, 64, 256], [16, 32], [64], [32, 64]]
    )
    assert sorted(map(len, (x for x in by_flops if x != [0, 1]))) == [1, 2, 2, 3]
    assert texts == ["chance 25.0%"]  # once
    assert sorted(legend) == [
        "coarse, zero-shot, folder:pets",
        "coarse, zero-shot, folder:pets (2)",
        "coarse, zero-shot, folder:pets, classes colours.txt",
        "coarse, zero-shot, tars:x",
    ]


def test_of_several_cascades_of_one_evaluation_the_last_is_drawn(drawn, tmp_path):
    rows = [row(budget=b) for b in (4, 16, 64)]
    few = CASCADE | {"small": 4, "large": 16}
    for new, title in ((few, "4→16"), (CASCADE, "16→64"), (few, "4→16")):
        _, cascades = results.write(tmp_path, rows, [new], pages_at)
        (_, by_flops), _, legend = drawn(rows, cascades)
        assert legend == ["coarse, zero-shot", f"cascade {title}"]
        assert sum(len(x) == 21 for x in by_flops) == 1
    assert len(cascades) == 2
