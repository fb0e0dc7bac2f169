"""Class names of a file belong to labels by name, or else by their order."""

import numpy as np
import pytest

from navit.evals.classes import matched, named, shown
from navit.sources.source import Task

BEFORE = ("ant", "bee", "cow")


@pytest.fixture
def file(tmp_path):
    def write(*names):
        (tmp_path / "names.txt").write_text("\n".join(names))
        return str(tmp_path / "names.txt")

    return write


def test_the_same_names_in_another_order_are_matched(file, caplog):
    caplog.set_level("INFO", "navit")
    assert named(file("ant", "bee", "cow"), BEFORE) == BEFORE
    assert caplog.messages == []
    assert named(file("Cow", "ant", "bee"), BEFORE) == ("ant", "bee", "Cow")
    assert "matched to the labels of the same names" in caplog.text


def test_other_names_are_in_the_order_of_the_labels(file):
    assert named(file("a wasp", "bee", "a calf"), BEFORE) == ("a wasp", "bee", "a calf")
    # Labels without names: their own are numbers, and more names may follow.
    assert named(file("bee", "ant", "cow"), ("0", "1")) == ("bee", "ant", "cow")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant", "bee"), r"2 class names and the labels 3 .*\(ant, bee, cow\)"),
        (("a wasp", "cow", "bee"), r"'cow' is in place 2, but .* label 3: .*ant, bee"),
        (("bee", "bee", "cow"), "'bee' is in place 1"),
    ],
)
def test_names_in_the_place_of_others_are_refused(file, names, message):
    with pytest.raises(ValueError, match=message):
        named(file(*names), BEFORE)


def test_labels_of_one_set_are_numbered_as_in_another():
    learned = Task(("cow", "ant", "bee"), np.array([0, 2, -1, 1], np.int32))
    assert matched(learned, BEFORE, "t").tolist() == [2, 1, -1, 0]
    with pytest.raises(ValueError) as error:
        matched(learned, ("ant", "bee", "dog"), "t")
    for words in ("'t'", "train_source lacks dog", "source lacks cow", "data.train"):
        assert words in str(error.value)


def test_long_lists_are_shortened():
    assert shown(BEFORE) == "ant, bee, cow"
    assert shown([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7, and 2 more"
