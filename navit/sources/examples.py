"""Reads `tf.train.Example` with protobuf's runtime, without TensorFlow.

The message is TensorFlow's public format (tensorflow/core/example/example.proto and
feature.proto). It is defined in its own descriptor pool, so that it does not clash with
TensorFlow's if both are imported.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message,
    message_factory,
    text_format,
)

from navit.sources import records

_FILE = """
  name: "navit/example.proto" package: "navit.example" syntax: "proto3"
  message_type { name: "Example"
    field { name: "features" number: 1 label: LABEL_OPTIONAL type_name: "Features" } }
  message_type { name: "Features"
    field { name: "feature" number: 1 label: LABEL_REPEATED
            type_name: "FeatureEntry" }
    nested_type { name: "FeatureEntry" options { map_entry: true }
      field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
      field { name: "value" number: 2 label: LABEL_OPTIONAL type_name: "Feature" } } }
  message_type { name: "Feature" oneof_decl { name: "kind" }
    field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL oneof_index: 0
            type_name: "BytesList" }
    field { name: "float_list" number: 2 label: LABEL_OPTIONAL oneof_index: 0
            type_name: "FloatList" }
    field { name: "int64_list" number: 3 label: LABEL_OPTIONAL oneof_index: 0
            type_name: "Int64List" } }
  message_type { name: "BytesList"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
  message_type { name: "FloatList"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
  message_type { name: "Int64List"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""


def parse(data: bytes) -> dict[str, list[Any]]:
    """The features by name: lists of bytes, floats or integers.

    Raises:
      ValueError: if `data` is not a `tf.train.Example`.
    """
    try:
        example = example_message().FromString(data)
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from None
    if not example.features.feature:
        raise ValueError("not a tf.train.Example, or one without features")
    features = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        features[name] = list(getattr(feature, kind).value) if kind else []
    return features


def raw(
    example: dict[str, list[Any]], image: str, caption: str, label: str
) -> records.Raw:
    """The record in the features of these names; empty names mean none.

    Raises:
      ValueError: if there is no encoded image, or a feature has another kind of value.
    """
    images = example.get(image, [])
    if len(images) != 1 or not isinstance(images[0], bytes):
        raise ValueError(f"the feature {image!r} has no encoded image")
    return records.Raw(
        images[0],
        records.label_text(example.get(label)),
        records.texts(example.get(caption)),
    )


@functools.cache
def example_message() -> Any:
    """The class of the message."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto()))
    descriptor = pool.FindMessageTypeByName("navit.example.Example")
    return message_factory.GetMessageClass(descriptor)
