"""Reads the settings in a release's JSON files, and refuses them by file and key."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("navit")

T = TypeVar("T")


class SettingError(ValueError):
    """A setting is missing or not supported; says in which file."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """A JSON object, read key by key.

    Every method raises SettingError for a value of another kind; the error names the
    file, the key and the value.

    Attributes:
      file: the file that it was read from.
      data: its content.
    """

    file: Path
    data: Mapping[str, Any]

    def part(self, key: str, *, optional: bool = False) -> Settings:
        """The object under `key`; an `optional` one that is missing is empty."""
        if key not in self.data and not optional:
            raise SettingError(f"{self.file} lacks {key}, which should be an object")
        value = self.data.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Settings(self.file, value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default, it must be there."""
        if key not in self.data and default is None:
            raise SettingError(f"{self.file} lacks {key}, which should be a text")
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; without a default, it must be there."""
        if key not in self.data:
            if default is None:
                raise SettingError(f"{self.file} lacks {key}, which should be a number")
            log.info("%s does not state %s: assuming %d", self.file, key, default)
            return default
        value = self.data[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a whole number of at least 1")
        return value

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.data.get(key, default)
        if not _is_number(value) or not 0 < value < math.inf:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def indices(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 on; it must be there."""
        value = self.data.get(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value
        ):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(value)

    def colours(
        self, key: str, default: tuple[float, ...], *, zero: bool
    ) -> tuple[float, ...]:
        """Three numbers from 0 to 1, one for each colour.

        Args:
          zero: whether they may be 0.
        """
        value = self.data.get(key, default)
        valid = isinstance(value, list | tuple) and len(value) == 3
        if not valid or not all(_is_number(x) and 0 <= x <= 1 for x in value):
            raise self._wrong(key, "three numbers from 0 to 1")
        if not zero and not min(value):
            raise self._wrong(key, "three numbers above 0")
        return tuple(float(x) for x in value)

    def choice(self, key: str, known: Mapping[Any, T], default: Any) -> T:
        """What a value stands for, of those that navit knows."""
        value = self.data.get(key, default)
        for name, meaning in known.items():
            if _same(value, name):
                return meaning
        raise self._unknown(key, *known)

    def expect(self, **values: Any) -> None:
        """Refuses each of these settings that is stated with another value."""
        for key, value in values.items():
            if key in self.data and not _same(self.data[key], value):
                raise self._unknown(key, value)

    def agree(self, **sizes: int) -> None:
        """Refuses each of these sizes that is stated otherwise than tensors have it.

        A size may be stated once, or for both axes: 14, [14, 14], or {"height": 14,
        "width": 14}.
        """
        for key, size in sizes.items():
            if key not in self.data:
                continue
            value = self.data[key]
            if isinstance(value, dict):
                value = [*value.values()]
            both = value if isinstance(value, list) and value else [value]
            if not all(_same(x, size) for x in both):
                raise SettingError(
                    f"{self.file}: {key} is {self.data[key]!r}, but the tensors make "
                    f"it {size}"
                )

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Names the file in the error of a config that refuses its settings."""
        try:
            yield
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError(f"{self.file}: {error}") from None

    def _wrong(self, key: str, what: str) -> SettingError:
        return SettingError(
            f"{self.file}: {key} is {self.data.get(key)!r}, but should be {what}"
        )

    def _unknown(self, key: str, *known: Any) -> SettingError:
        return SettingError(
            f"{self.file}: {key}={self.data.get(key)!r} is not supported; navit knows "
            f"{', '.join(map(repr, known))}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: True is not 1, and floats may be rounded."""
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=1e-9)
    return type(a) is type(b) and a == b
