"""Trees of frozen dataclasses: `key.path=value` overrides, and to and from JSON."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")

# Changes are a tree: the key of a node's field, or this for the text of the whole node.
_WHOLE = "="


def positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not positive."""
    for name in names:
        if not getattr(config, name) > 0:  # also refuses nan
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")


def nearest(word: str, words: Iterable[str]) -> str:
    """ "did you mean 'X'?" for a word like one of these; else empty."""
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def override(config: T, assignments: Sequence[str]) -> T:
    """Returns a copy of `config` with each `"a.b=value"` applied.

    Values are Python literals; a bare word is a string; `256,729` is a tuple. If a
    field takes one of several dataclasses that have a `short` name, `a.b=NAME` or
    `a.b=NAME:VALUE` chooses one, with VALUE as its first field, and `a.b.c=value` sets
    another field of the chosen one. If a field is a tuple of such dataclasses,
    `a.b=NAME,NAME:VALUE` chooses them all, and `a.b.NAME.c=value` sets a field of one;
    where a name repeats, `a.b.0.c=value` sets one of the first. If it is a tuple of one
    dataclass, `a.b=FIRST,FIRST:SECOND` makes one for each word, with these as its first
    fields; the first is then its name.

    Raises:
      ValueError: for an unknown key (with the nearest known one), two paths for a
        key, a value of the wrong type, or a config that contradicts itself.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ValueError(f"expected key.path=value, got {assignment!r}")
        node = changes
        for key in path.split("."):
            node = node.setdefault(key, {})
        # The last of several values counts. But two paths are more likely a pattern
        # with braces that the shell has expanded.
        other = node.get(_WHOLE, text)
        if other != text and all(re.search("[:/]", x) for x in (other, text)):
            raise ValueError(
                f"{path} is set twice, to {other!r} and {text!r}: set it once, and put "
                "a pattern with braces in quotes"
            )
        node[_WHOLE] = text
    return _apply(config, changes)


def to_json(config: Any) -> Any:
    """The config as JSON data; each dataclass has its name as "type"."""
    if dataclasses.is_dataclass(config):
        fields = {
            f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)
        }
        return {"type": type(config).__name__} | fields
    return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(data: Any, hint: Any, path: str = "") -> Any:
    """The inverse of `to_json`.

    Raises:
      ValueError: for a key that this version of navit does not know, or a value of the
        wrong type; names it.
    """
    where, options = path or "config", [hint, *typing.get_args(hint)]
    if isinstance(data, dict):
        named = data.get("type")
        cls: Any = next(
            (o for o in options if dataclasses.is_dataclass(o) and _name(o) == named),
            None,
        )
        if cls is None:
            raise ValueError(f"{where}: a config of type {named!r} is unknown here")
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in data.items():
            if key == "type":
                continue
            if key not in hints:
                raise ValueError(
                    f"{where}: {_name(cls)} has no field {key!r} in this version"
                )
            values[key] = from_json(value, hints[key], f"{path}.{key}".lstrip("."))
        return cls(**values)
    if isinstance(data, list):
        items = [
            typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple
        ]
        if items:
            return tuple(from_json(value, items[0], path) for value in data)
    is_integer = isinstance(data, int) and not isinstance(data, bool)
    if is_integer and float in options and int not in options:
        return float(data)
    if not _matches(data, hint):
        raise ValueError(f"{where}: expected {_name(hint)}, not {data!r}")
    return data


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """`key: a -> b` for every leaf in which two configs differ."""
    lines: list[str] = []
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for f in dataclasses.fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            lines += differences(x, y, f"{path}.{f.name}".lstrip("."))
        return lines
    if (kinds := _kinds(a)) and kinds == _kinds(b):
        for key, x, y in zip(_keys(a), a, b, strict=True):
            lines += differences(x, y, f"{path}.{key}")
        return lines
    return [] if a == b else [f"{path}: {a!r} -> {b!r}"]


def _apply(node: Any, changes: dict[str, Any], path: str = "") -> Any:
    """Applies all changes of a node at once, so that their order never matters."""
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ValueError(f"{path}: {node!r} has no field {next(iter(changes))!r}")
    hints = typing.get_type_hints(type(node))
    values = {}
    for key, change in changes.items():
        full = f"{path}.{key}".lstrip(".")
        if key not in hints:
            if new := getattr(node, "renamed", {}).get(key):
                new = f"{path}.{new}".lstrip(".")
                text = change.get(_WHOLE, "VALUE")
                raise ValueError(f"{full} is now {new}: set {new}={text}")
            raise ValueError(
                f"{full}: {type(node).__name__} has no field {key!r}; "
                f"{_known(key, hints)}"
            )
        if _choices(hints[key]):
            text = change.get(_WHOLE, "")
            if why := getattr(node, "removed", {}).get(text.partition(":")[0]):
                raise ValueError(f"{full}={text} was removed: {why}")
        values[key] = _changed(getattr(node, key), change, hints[key], full)
    try:
        return dataclasses.replace(node, **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}".lstrip(": ")) from None


def _changed(value: Any, change: dict[str, Any], hint: Any, path: str) -> Any:
    """A field's value after its changes: another value, or one with other fields."""
    if item := _item(hint):
        return _changed_items(value, change, item, path)
    parts = dict(change)
    text = parts.pop(_WHOLE, None)
    option = None if text is None else _option(text, hint)
    if option is not None:
        value, (_, has_value, first) = option(), text.partition(":")
        name = dataclasses.fields(option)[0].name
        if has_value and name in parts:
            other = parts[name].get(_WHOLE)
            raise ValueError(f"{path}.{name} is set twice, to {first!r} and {other!r}")
        if has_value:
            parts[name] = {_WHOLE: first}
    elif text is not None:
        value = _parse(text, hint, path)
        if parts:
            raise ValueError(f"{path}={text} is set both whole and in part")
        return value
    elif value is None:  # an unset option: change its defaults
        made: Any = [o for o in typing.get_args(hint) if dataclasses.is_dataclass(o)]
        try:
            value = made[0]() if len(made) == 1 else None
        except TypeError:  # some fields have no default
            raise ValueError(
                f"{path} is none, so it has no field {next(iter(parts))!r} to set"
            ) from None
    return _apply(value, parts, path)


def _changed_items(items: tuple, change: dict[str, Any], hint: Any, path: str) -> tuple:
    """A tuple after its changes: other dataclasses of `hint`, or fields of some."""
    changes = dict(change)
    whole = changes.pop(_WHOLE, None)
    words = [] if whole is None else whole.split(",")
    if not dataclasses.is_dataclass(hint):
        # `_parse` raises for a word that names none.
        items = tuple(_option(x, hint) or _parse(x, hint, path) for x in words) or items
    elif whole is not None:  # each word makes one
        words = [] if whole in ("()", "none") else words
        items, words = tuple(_made(word, hint, path) for word in words), []
    keys = _keys(items)
    for key, fields in changes.items():
        full = f"{path}.{key}"
        if not keys:
            raise ValueError(f"{full}: {path} is empty: add {path}={key}")
        if key not in keys:
            raise ValueError(
                f"{full}: expected {path}.NAME.FIELD=VALUE; {_known(key, keys)}"
            )
        if (text := fields.get(_WHOLE)) is not None:
            first = dataclasses.fields(items[keys.index(key)])[0].name
            raise ValueError(f"{full} has fields: set {full}.{first}={text}")
    for key, word in zip(keys, words, strict=False):
        changes[key] = {**changes.get(key, {}), _WHOLE: word}
    return tuple(
        _changed(item, changes.get(key, {}), hint, f"{path}.{key}")
        for key, item in zip(keys, items, strict=True)
    )


def _option(text: str, hint: Any) -> Any:
    """The dataclass that `NAME` or `NAME:VALUE` names, if any."""
    name = text.partition(":")[0]
    named = (o for o in _choices(hint) if name in (o.short, o.__name__))
    return next(named, None)


def _item(hint: Any) -> Any:
    """The dataclasses of which a field of this type is a tuple; None for others."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) or _choices(item) else None


def _made(word: str, cls: Any, path: str) -> Any:
    """The dataclass whose first fields are those of `FIRST` or `FIRST:SECOND`."""
    first, has_second, second = word.partition(":")
    field = dataclasses.fields(cls)[1].name
    hint = typing.get_type_hints(cls)[field]
    try:
        if not has_second:
            return cls(first)
        return cls(first, _parse(second, hint, f"{path}.{first}.{field}"))
    except ValueError as error:
        raise ValueError(f"{path}={word}: {error}") from None


def _named(item: Any) -> str:
    """How a dataclass of a tuple is named: by its class, or by its first field."""
    if hasattr(item, "short"):
        return item.short
    return getattr(item, dataclasses.fields(item)[0].name)


def _kinds(value: Any) -> list[tuple[type, str]]:
    """The types and names of a tuple of dataclasses; else empty."""
    items = value if isinstance(value, tuple) else ()
    return [(type(x), _named(x)) for x in items if dataclasses.is_dataclass(x)]


def _keys(items: tuple) -> list[str]:
    """The keys of a tuple's dataclasses: names, or indices for names that repeat."""
    names = [_named(x) for x in items]
    return [x if names.count(x) == 1 else str(i) for i, x in enumerate(names)]


def _choices(hint: Any) -> list[Any]:
    return [option for option in typing.get_args(hint) if hasattr(option, "short")]


def _parse(text: str, hint: Any, path: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    # A word that parses as something else may still be the field's value: "none" of a
    # Literal, a folder named 2024, the prompt {}; or several words of a Literal.
    for candidate in (_fit(value, hint), text, (text,), tuple(text.split(","))):
        if _matches(candidate, hint):
            return candidate
    parts: list[Any] = [
        x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)
    ]
    if len(parts) == 1:
        first = dataclasses.fields(parts[0])[0].name
        first_hint = typing.get_type_hints(parts[0])[first]
        if typing.get_origin(first_hint) is Literal and _matches(text, first_hint):
            raise ValueError(f"{path} has fields: set {path}.{first}={text}")
    raise ValueError(f"{path}: expected {_expected(hint, text)}, got {text!r}")


def _expected(hint: Any, text: str) -> str:
    inner = [hint, *typing.get_args(hint)]
    literals = [x for x in inner if typing.get_origin(x) is Literal]
    words = [str(word) for x in literals for word in typing.get_args(x)]
    words = words or [option.short for option in _choices(hint)]
    parts: list[Any] = [x for x in inner if dataclasses.is_dataclass(x)]
    if not words and len(parts) == 1:
        first = dataclasses.fields(parts[0])[0].name
        expected = _expected(typing.get_type_hints(parts[0])[first], text)
        none = "none, or " if type(None) in inner else ""
        return f"{none}a field of {_name(parts[0])}, such as .{first} ({expected})"
    if not words:
        return _name(hint)
    near = nearest(text.partition(":")[0], words)
    some = "some" if typing.get_origin(hint) is tuple else "one"
    return f"{some} of {', '.join(words)}" + (f" ({near})" if near else "")


def _known(word: str, words: Iterable[str]) -> str:
    return nearest(word, words) or f"it has {', '.join(words)}"


def _fit(value: Any, hint: Any) -> Any:
    """Widens a value to its field's type: 1 to 1.0, 256 to (256,)."""
    hints = typing.get_args(hint) if _is_union(hint) else (hint,)
    if float in hints and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    items = [typing.get_args(h)[0] for h in hints if typing.get_origin(h) is tuple]
    if items and value is not None:
        many = value if isinstance(value, list | tuple) else [value]
        return tuple(_fit(x, items[0]) for x in many)
    return value


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if _is_union(hint):
        return any(_matches(value, h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_matches(v, item) for v in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _name(hint: Any) -> str:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "")
