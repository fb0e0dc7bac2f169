"""Lists of class names and of prompt templates, from the files that users have.

A text file has one a line. A `.json` file has a list, or an object of lists, as the
files of CLIP_benchmark and open_clip: `FILE.json#KEY` names one of its lists, and a
single list needs no key.
"""

from __future__ import annotations

import json
from pathlib import Path


def class_names(path: str | None) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels; none if there is no path.

    Raises:
      FileNotFoundError, ValueError: as `lines` does; and for an empty name, which would
        shift all names after it.
    """
    names = lines(path) if path else []
    if "" in names:
        raise ValueError(
            f"{path}: name {names.index('') + 1} is empty, and labels count the names: "
            "give it a name, or delete it if the labels skip it"
        )
    return tuple(names)


def lines(path: str) -> list[str]:
    """The lines of a file, or the entries of a list in it, without outer spaces.

    Raises:
      FileNotFoundError, ValueError: for a missing or empty file, or JSON that has no
        such list.
    """
    file, key = Path(path).expanduser(), None
    if not file.exists() and "#" in path:
        path, _, key = path.rpartition("#")
        file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}: it must be a .txt with one a line, or a .json "
            "with a list or an object of lists (FILE.json#KEY)"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if file.suffix == ".json":
        found = _chosen(file, text, key)
    elif key is not None:
        raise ValueError(f"{file} has no entries: leave out #{key}")
    else:
        # Not splitlines(), which also ends a line at U+2028 and the like.
        found = text.rstrip().split("\n")
    found = [line.strip() for line in found]
    if not any(found):
        raise ValueError(f"{file} is empty: write one entry a line, or a list in JSON")
    return found


def _chosen(file: Path, text: str, key: str | None) -> list[str]:
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
