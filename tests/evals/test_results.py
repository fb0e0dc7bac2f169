"""The table of results grows, whoever writes to it."""

import csv
import json
import threading

import pytest

from navit.evals import figure, notes, results


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
        "settings": {"dct": "fast"},
        "date": "2026-01-01",
        **others,
    }


def pages_at(budget):
    return [notes.Page("letter page", budget, (5, 4), (80, 64), 7)]


CASCADE = {
    **{name: row()[name] for name in ("step", "weights", "set", "kind", "images")},
    **{name: row()[name] for name in ("data", "settings", "date")},
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
    assert [len(table) - 2 for table in tables] == [4, 1, 2]  # a page at each budget
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
    assert "label_accuracy 80.0% (50.0%)" in (tmp_path / "budgets.md").read_text()


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
    rows[1]["unreadable"] = 2
    lines = results.text(rows, [CASCADE]).splitlines()
    assert lines[0].split()[:4] == ["set", "kind", "tokens", "used"]
    assert [line.split()[2] for line in lines[1:4]] == ["16", "64", "65"]
    assert "accuracy 50.0% (25.0%), ECE 0.123" in lines[1]
    assert "3 (2 unreadable)" in lines[2]
    assert lines[5].startswith("cascade") and "16→64" in lines[6]
    assert "50.0% (0)" in lines[6] and "70.0% (20)" in lines[6]
    assert lines[7:] == [f"note: {note}"]


def test_the_plot_is_a_picture():
    rows = [row(), row(budget=64)]
    recalls = {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25}
    rows += [
        row(budget=b, set="retrieval", kind="retrieval", metrics=recalls)
        | {"chance": dict.fromkeys(recalls, 0.1)}
        for b in (16, 64)
    ]
    assert figure.plot(rows, [CASCADE]).startswith(b"\x89PNG")
