"""Class names and templates are read in all the forms that users have them in."""

import json
from pathlib import Path

import pytest

from navit.evals.prompts import load_templates
from navit.sources.names import class_names

PROMPTS = Path(__file__).parents[2] / "data/prompts"


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("x.txt", "a {} here\n\n  the {c}  \r\n", ""),
        ("x.txt", "\ufeffa {} here\nthe {}", ""),
        ("x.json", ["a {c} here", "the {}"], ""),
        ("x.json", {"birds": ["a {c} here", "the {c}"]}, ""),
        ("x.json", {"birds": ["a {c} here", "the {c}"], "cars": ["{c}"]}, "#birds"),
        ("odd#name.txt", "a {} here\nthe {}", ""),
        ("odd#name.json", {"a": ["{}"], "birds": ["a {} here", "the {}"]}, "#birds"),
    ],
)
def test_every_form_gives_the_same_templates(name, content, key, tmp_path):
    path = written(tmp_path / name, content) + key
    assert load_templates(path) == ("a {} here", "the {}")


def test_class_names_keep_their_order(tmp_path):
    path = written(tmp_path / "names.json", {"birds": ["wren", "owl", "a {} bird"]})
    assert class_names(path) == ("wren", "owl", "a {} bird")


def test_the_prompts_of_this_project_load():
    files = sorted(PROMPTS.glob("*.txt"))
    counts = {file.stem: len(set(load_templates(str(file)))) for file in files}
    assert counts == {"photos": 10, "simple": 1}


@pytest.mark.parametrize(
    ("name", "content", "key", "message"),
    [
        ("x.txt", None, "", r"there is no file .*x\.txt: it must be a \.txt"),
        ("x.json", None, "#birds", r"there is no file .*x\.json: "),
        ("x.txt", " \n\n", "", r"x\.txt is empty: write one entry a line"),
        ("x.json", [], "", r"x\.json is empty"),
        ("x.json", {"a": []}, "", r"x\.json is empty"),
        ("x.txt", "a {}\na photo\n", "", r"'a photo' has 0 places .* once in each"),
        ("x.txt", "{} and {c}", "", r"'{} and {c}' has 2 places"),
        ("x.txt", "{}", "#birds", r"x\.txt has no entries: leave out #birds"),
        ("x.json", ["{}"], "#birds", r"x\.json is one list: leave out #birds"),
        ("x.json", "{}{", "", r"x\.json is not JSON: "),
        ("x.json", {}, "", r"needs a key: .* its keys: none"),
        ("x.json", {"a": ["{}"], "b": ["{}"]}, "", r"json#KEY; its keys: a, b"),
        ("x.json", {"a": ["{}"]}, "#c", r"has no entry 'c': .* its keys: a$"),
        ("x.json", {"a": {"b": ["{}"]}}, "", r"x\.json#a must be a list of strings"),
        ("x.json", [1, 2], "", r"x\.json must be a list of strings"),
    ],
)
def test_bad_templates_are_one_clear_line(name, content, key, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_templates(f"{path}{key}")
    assert "\n" not in str(caught.value)
