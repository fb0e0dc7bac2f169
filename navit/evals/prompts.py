"""Class names and prompt templates, from the files in which users have them.

A `.txt` file has one a line. A `.json` file has a list, or an object of lists, as the
files of CLIP_benchmark and open_clip: `FILE.json#KEY` names one of its lists, and a
single list needs no key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def load_templates(path: str) -> tuple[str, ...]:
    """Reads prompt templates. The class name goes where "{}" or "{c}" is.

    Returns:
      Templates with one "{}" each.

    Raises:
      FileNotFoundError, ValueError: for a missing or empty file, or a template that
        does not have exactly one place.
    """
    templates = []
    for line in _load(path):
        template = line.replace("{c}", "{}")
        if template.count("{}") != 1:
            raise ValueError(
                f"{path}: the template {line!r} has {template.count('{}')} places for "
                'the class name: write "{}" or "{c}" once in each'
            )
        templates.append(template)
    return tuple(templates)


def load_class_names(
    path: str, *, classes: int | None = None, allow_repeated: bool = False
) -> tuple[str, ...]:
    """Reads class names, in the order of the labels.

    Args:
      classes: the number of classes that the labels have, if known.
      allow_repeated: accept classes with the same name: in CLIP's list for ImageNet,
        two are "sunglasses". Their vectors are equal, so the later is never found.

    Raises:
      FileNotFoundError, ValueError: for a missing or empty file, a repeated name, or
        another number of names than of classes.
    """
    names = _load(path)
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if first.setdefault(name, index) != index and not allow_repeated:
            raise ValueError(
                f"{path}: classes {first[name]} and {index} are both {name!r}: rename "
                "one, or pass allow_repeated=True if the later one need not be found"
            )
    if classes is not None and len(names) != classes:
        raise ValueError(
            f"{path} has {len(names)} class names and the labels {classes} classes: "
            "give one name for each class, in the order of the labels"
        )
    return tuple(names)


def _load(path: str) -> Sequence[str]:
    file, key = Path(path).expanduser(), None
    if not file.exists() and "#" in path:
        path, _, key = path.rpartition("#")
        file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}: it must be a .txt with one a line, or a .json "
            "with a list or an object of lists (FILE.json#KEY)"
        )
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        lines = _choose(file, text, key)
    elif key is not None:
        raise ValueError(f"{file} has no entries: leave out #{key}")
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty: write one a line, or in JSON a list")
    return lines


def _choose(file: Path, text: str, key: str | None) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(content, dict):
        if key is None and len(content) == 1:
            key = next(iter(content))
        if key not in content:
            problem = "needs a key" if key is None else f"has no entry {key!r}"
            known = ", ".join(content) or "none"
            raise ValueError(f"{file} {problem}: write {file}#KEY; its keys: {known}")
        content = content[key]
    elif key is not None:
        raise ValueError(f"{file} is one list: leave out #{key}")
    if not isinstance(content, list) or not all(isinstance(x, str) for x in content):
        where = f"{file}#{key}" if key is not None else str(file)
        raise ValueError(f"{where} must be a list of strings")
    return content
