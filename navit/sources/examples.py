"""Reads and writes `tf.train.Example` with protobuf's runtime, without TensorFlow.

The message is TensorFlow's public format (tensorflow/core/example/example.proto and
feature.proto). It is defined in its own descriptor pool, so that it does not clash with
TensorFlow's if both are imported.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_PACKAGE = "navit.example"
_FIELD = descriptor_pb2.FieldDescriptorProto


def parse(data: bytes) -> dict[str, list[Any]]:
    """The features by name: lists of bytes, floats or integers.

    Raises:
      ValueError: if `data` is not a `tf.train.Example`.
    """
    try:
        example = _message().FromString(data)
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from None
    if not example.features.feature:
        raise ValueError("not a tf.train.Example, or one without features")
    features = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        features[name] = list(getattr(feature, kind).value) if kind else []
    return features


def serialize(features: dict[str, Any]) -> bytes:
    """The inverse of `parse`; each feature is bytes, text, integers or floats.

    A feature is one value or a list of them. Text is encoded as UTF-8.
    """
    example = _message()()
    for name, value in features.items():
        values = value if isinstance(value, list | tuple) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
        feature = example.features.feature[name]
        if values:
            getattr(feature, kind[type(values[0])]).value.extend(values)
    return example.SerializeToString(deterministic=True)


@functools.cache
def _message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="navit/example.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, kind in (
        ("BytesList", _FIELD.TYPE_BYTES),
        ("FloatList", _FIELD.TYPE_FLOAT),
        ("Int64List", _FIELD.TYPE_INT64),
    ):
        _add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        kind = "".join(word.capitalize() for word in name.split("_"))
        _add(feature, name, number, kind).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    _add(entry, "key", 1, _FIELD.TYPE_STRING)
    _add(entry, "value", 2, "Feature")
    _add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    _add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{_PACKAGE}.Example")
    return message_factory.GetMessageClass(descriptor)


def _add(
    parent: Any, name: str, number: int, kind: int | str, *, repeated: bool = False
) -> Any:
    field = parent.field.add(name=name, number=number)
    field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
    if isinstance(kind, str):
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = kind
    return field
