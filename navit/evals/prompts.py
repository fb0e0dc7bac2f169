"""Prompt templates for zero-shot, from files in the forms of `sources/names.py`."""

from __future__ import annotations

from navit.sources.names import lines


def load_templates(path: str) -> tuple[str, ...]:
    """Reads prompt templates. The class name goes where "{}" or "{c}" is.

    Returns:
      Templates with one "{}" each.

    Raises:
      FileNotFoundError, ValueError: for a missing or empty file, or a template that
        does not have exactly one place.
    """
    templates = []
    for line in filter(None, lines(path)):
        template = line.replace("{c}", "{}")
        if template.count("{}") != 1:
            raise ValueError(
                f"{path}: the template {line!r} has {template.count('{}')} places for "
                'the class name: write "{}" or "{c}" once in each'
            )
        templates.append(template)
    return tuple(templates)
