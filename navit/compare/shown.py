"""The images that are compared: sizes, files, folders, tables and tars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from navit.compare.arguments import size_in
from navit.input.image_list import Named, images_of
from navit.sources.images import size_of


class Shown(NamedTuple):
    """An image, or a blank page if `file` is None, and its size."""

    name: str
    height: int
    width: int
    file: Named | None = None


def shown(arguments: Sequence[str]) -> list[Shown]:
    """The images that the arguments stand for. Only sizes are read.

    Raises:
      FileNotFoundError, ValueError: for an argument that is missing, has no image or
        cannot be read.
    """
    found = []
    for argument in arguments:
        size = None if os.path.exists(argument) else size_in(argument)
        if size is not None:
            found.append(Shown(argument, *size))
            continue
        for image in images_of([argument]):
            found.append(Shown(image.name, *_size_of(image), image))
    return found


def _size_of(image: Named) -> tuple[int, int]:
    try:
        with image.open() as file:
            return size_of(file)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {image.name}: {reason}") from error
