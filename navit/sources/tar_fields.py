"""The members of WebDataset's samples, and the captions and labels in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from navit.sources import records

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm")
# Suffixes of tars that only `navit reshard` reads, as they have no random access.
COMPRESSED = (".tar.gz", ".tgz")
_CAPTIONS = ("txt", "json.caption")
# webdataset's rule: the key ends at the first dot of the file name.
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class Wanted(NamedTuple):
    """A member, or a field of a .json, which an error is raised without if it must."""

    member: str
    field: str
    must: bool


class Fields:
    """Where a sample's captions and its label are.

    Args:
      caption, label: a member, such as "txt", or a field of a .json, such as
        "json.caption"; no caption means the usual ones, no label none.
      texts: whether to read them at all.

    Attributes:
      wanted: what is read of a sample, besides the image.
      columns: the members to find: the image and those of `wanted`.
    """

    def __init__(self, caption: str | None, label: str, *, texts: bool = True) -> None:
        self.wanted: list[Wanted] = []
        if texts:
            self.wanted = _wanted(caption, label)
        members = [wanted.member for wanted in self.wanted if wanted.member]
        self.columns = ["image", *dict.fromkeys(members)]

    def texts(self, value: Callable[[int], Any]) -> tuple[str, tuple[str, ...]]:
        """(label, captions); the first of `wanted` that has captions counts.

        Args:
          value: the content of `wanted` by its number; None if there is none.

        Raises:
          ValueError: if both are missing.
        """
        if not self.wanted:
            return "", ()
        captions: tuple[str, ...] = ()
        for number in range(len(self.wanted) - 1):
            if not captions:
                captions = records.texts(value(number))
        label = records.label_text(value(len(self.wanted) - 1))
        records.check_texts(label, captions)
        return label, captions


def _wanted(caption: str | None, label: str) -> list[Wanted]:
    names = [caption] if caption else _CAPTIONS
    captions = [Wanted(*_spec(name), bool(caption)) for name in names]
    return [*captions, Wanted(*_spec(label), True)]


def field_of(data: bytes | None, name: str, field: str, must: bool) -> Any:
    """A whole member, or a field of a .json; None if there is none.

    Raises:
      ValueError: if the .json lacks the field and must have it.
    """
    if data is None or not field:
        return data
    content = json.loads(data)
    if not must and isinstance(content, dict) and field not in content:
        return None
    return records.nested(content, field, f"its .{name}")


def _spec(name: str) -> tuple[str, str]:
    """`json.a.b` -> ("json", "a.b"); `txt` -> ("txt", "")."""
    name = name.lstrip(".")
    member, _, field = name.partition(".")
    if member != "json":
        return name, ""
    if not field:
        raise ValueError(f"{name!r}: name which field of the .json, as json.caption")
    return member, field
