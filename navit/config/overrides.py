"""Trees of frozen dataclasses: `key.path=value` overrides, and to and from JSON."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")

# Among the changes of a node's fields, the key for a change of the whole node.
_WHOLE = ""


def positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not positive."""
    for name in names:
        if not getattr(config, name) > 0:  # also refuses nan
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")


def override(config: T, assignments: Sequence[str]) -> T:
    """Returns a copy of `config` with each `"a.b=value"` applied.

    Values are Python literals; a bare word is a string; `256,729` is a tuple. If a
    field takes one of several dataclasses that have a `short` name, `a.b=NAME` or
    `a.b=NAME:VALUE` chooses one, with VALUE as its first field, and `a.b.c=value` sets
    another field of the chosen one. If a field is a tuple of such dataclasses,
    `a.b=NAME,NAME:VALUE` chooses them all, and `a.b.NAME.c=value` sets a field of one.
    If it is a tuple of one dataclass, `a.b=FIRST,FIRST:SECOND` makes one for each word,
    with these as its first fields; the first is then its name.

    Raises:
      ValueError: for an unknown key (with the nearest known one), a value of the wrong
        type, or a config that contradicts itself.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ValueError(f"expected key.path=value, got {assignment!r}")
        *parents, last = path.split(".")
        node = changes
        for key in parents:
            child = node.setdefault(key, {})
            if isinstance(child, str):
                child = node[key] = {_WHOLE: child}
            node = child
        if isinstance(node.get(last), dict):
            node[last][_WHOLE] = text
        else:
            node[last] = text
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
    options = [hint, *typing.get_args(hint)]
    if isinstance(data, dict):
        named = data.get("type")
        cls = next(
            (o for o in options if dataclasses.is_dataclass(o) and _name(o) == named),
            None,
        )
        if cls is None:
            raise ValueError(
                f"{path or 'config'}: a config of type {named!r} is unknown here"
            )
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in data.items():
            if key == "type":
                continue
            if key not in hints:
                raise ValueError(
                    f"{path or 'config'}: {_name(cls)} has no field {key!r} in this "
                    "version"
                )
            values[key] = from_json(value, hints[key], f"{path}.{key}".lstrip("."))
        made: Any = cls
        return made(**values)
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
        raise ValueError(f"{path or 'config'}: expected {_name(hint)}, not {data!r}")
    return data


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """`key: a -> b` for every leaf in which two configs differ."""
    lines: list[str] = []
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for f in dataclasses.fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            lines += differences(x, y, f"{path}.{f.name}".lstrip("."))
        return lines
    if _kinds(a) and _kinds(a) == _kinds(b):
        for x, y in zip(a, b, strict=True):
            lines += differences(x, y, f"{path}.{_named(x)}")
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
                value = change if isinstance(change, str) else "VALUE"
                raise ValueError(f"{full} is now {new}: set {new}={value}")
            near = difflib.get_close_matches(key, hints, n=1)
            known = (
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(hints)}"
            )
            raise ValueError(
                f"{full}: {type(node).__name__} has no field {key!r}; {known}"
            )
        child = getattr(node, key)
        if item := _item(hints[key]):
            values[key] = _apply_each(child, change, item, full)
            continue
        if (chosen := _choose(change, hints[key], full)) is not None:
            child, change = chosen
        if isinstance(change, dict):
            if child is None:  # an unset option: change its defaults
                options = typing.get_args(hints[key])
                made: Any = [o for o in options if dataclasses.is_dataclass(o)]
                child = made[0]() if len(made) == 1 else None
            values[key] = _apply(child, change, full)
        else:
            values[key] = _parse(change, hints[key], full)
    try:
        return dataclasses.replace(node, **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}".lstrip(": ")) from None


def _apply_each(items: Any, change: Any, hint: Any, path: str) -> tuple:
    """Applies a change to a tuple of dataclasses: other ones, or fields of some.

    Args:
      hint: the dataclasses to choose from.
    """
    changes = dict(change) if isinstance(change, dict) else {_WHOLE: change}
    whole = changes.pop(_WHOLE, None)
    words = [] if whole is None else whole.split(",")
    if dataclasses.is_dataclass(hint):  # each word makes one
        if whole is not None:
            words = [] if whole in ("()", "none") else words
            items, whole = tuple(_made(word, hint, path) for word in words), None
        names = [_named(item) for item in items]
    else:
        options = [_option(word, hint) for word in words]
        if None in options:
            _parse(words[options.index(None)], hint, path)  # raises
        names = [_named(item) for item in options or items]
    for name, fields in changes.items():
        if names.count(name) != 1 or not isinstance(fields, dict):
            near = difflib.get_close_matches(name, names, n=1)
            known = (
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            )
            raise ValueError(
                f"{path}.{name}: expected {path}.NAME.FIELD=VALUE; {known}"
            )
    result = []
    for i, name in enumerate(names):
        fields, full = changes.get(name, {}), f"{path}.{name}"
        if whole is None:
            node = items[i]
        else:
            chosen = _choose({_WHOLE: words[i], **fields}, hint, full)
            assert chosen is not None  # `_option` found it
            node, fields = chosen
        result.append(_apply(node, fields, full))
    return tuple(result)


def _choose(change: Any, hint: Any, path: str) -> tuple[Any, dict] | None:
    """The dataclass that `NAME:VALUE` chooses, with its changes; None if no choice."""
    parts = dict(change) if isinstance(change, dict) else {_WHOLE: change}
    if (whole := parts.pop(_WHOLE, None)) is None:
        return None
    option = _option(whole, hint)
    if option is None:
        if parts:
            _parse(whole, hint, path)
            raise ValueError(f"{path}={whole} is set both whole and in part")
        return None
    _, has_value, value = whole.partition(":")
    if has_value:
        first = dataclasses.fields(option)[0].name
        if first in parts:
            raise ValueError(
                f"{path}.{first} is set twice, to {value!r} and {parts[first]!r}"
            )
        parts[first] = value
    return option(), parts


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
    raise ValueError(f"{path}: expected {_expected(hint, text)}, got {text!r}")


def _expected(hint: Any, text: str) -> str:
    inner = [hint, *typing.get_args(hint)]
    literals = [x for x in inner if typing.get_origin(x) is Literal]
    words = [str(word) for x in literals for word in typing.get_args(x)]
    words = words or [option.short for option in _choices(hint)]
    if not words:
        return _name(hint)
    text = text.partition(":")[0]
    near = difflib.get_close_matches(text, words, n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    some = "some" if typing.get_origin(hint) is tuple else "one"
    return f"{some} of {', '.join(words)}{suggestion}"


def _fit(value: Any, hint: Any) -> Any:
    """Widens a value to its field's type: 1 to 1.0, 256 to (256,)."""
    hints = typing.get_args(hint) if _is_union(hint) else (hint,)
    if float in hints and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_tuple = any(typing.get_origin(h) is tuple for h in hints)
    if is_tuple and value is not None and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if isinstance(value, tuple) and any(
        typing.get_origin(h) is tuple and typing.get_args(h)[0] is float for h in hints
    ):
        return tuple(_fit(item, float) for item in value)
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
