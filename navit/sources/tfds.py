"""Reads prepared TensorFlow datasets on this machine, without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from navit import config
from navit.sources import records, storage
from navit.sources.cache import Place, digest
from navit.sources.names import class_names

_FORMATS = ("array_record", "parquet")


class TfdsReader:
    """The records of one split.

    Raises:
      ValueError: if tensorflow_datasets is not installed, or the dataset is not
        prepared, has no random access, or lacks the split or a feature.
    """

    def __init__(self, source: config.Tfds) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise ValueError(
                f"the dataset {source.name!r} needs tensorflow_datasets: pip install "
                "tensorflow-datasets (TensorFlow is not needed)"
            ) from None
        builder = _builder(tfds, source)
        stored = builder.info.file_format.file_suffix
        where = f"{source.name} in {builder.data_path}"
        if stored not in _FORMATS:
            raise ValueError(
                f"{where} is stored as {stored}, which has no random access: "
                f"tfds build {source.name} --file_format=array_record"
            )
        features = builder.info.features
        self._image = source.image
        self._caption, self._label = records.choose(source, features, where, deep=True)
        for path in filter(None, (self._image, self._caption, self._label)):
            _feature(features, path, where)
        if not isinstance(_feature(features, self._image, where), tfds.features.Image):
            raise ValueError(f"{where}: the feature {self._image!r} is not an image")
        self.classes = class_names(source.classes)
        self.damaged: list[str] = []
        if self._label:
            label = _feature(features, self._label, where)
            if isinstance(label, tfds.features.ClassLabel):
                names = tuple(label.names)
                if self.classes and len(self.classes) != len(names):
                    raise ValueError(
                        f"{source.classes} names {len(self.classes)} classes, and "
                        f"{where} has {len(names)}"
                    )
                self.classes = self.classes or names
        decoders: Any = tfds.decode.SkipDecoding()
        for key in reversed(self._image.split(".")):
            decoders = {key: decoders}
        self._source = builder.as_data_source(source.split, decoders=decoders)
        split = builder.info.splits[source.split]
        if len(self._source) != split.num_examples:  # TFDS cannot cut Parquet
            raise ValueError(
                f"{where}: split={source.split!r} has {split.num_examples} examples, "
                f"and reading {stored} gives {len(self._source)}: name a whole split, "
                "or build the dataset with --file_format=array_record"
            )
        self._name = f"{source.name} {source.split}"
        stats = [(file.name, file.stat()) for file in split.filepaths]
        self.place = Place(
            Path(str(builder.data_path)),
            f"{where}, split {source.split} (image {self._image}, caption "
            f"{self._caption or 'none'}, label {self._label or 'none'})",
            digest([[(name, stat.length, stat.mtime) for name, stat in stats]]),
        )

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"{self._name}: record {index}"

    def record(self, index: int) -> records.Raw:
        data, where = self._read(index), self.name(index)
        caption = records.nested(data, self._caption, where) if self._caption else None
        label = records.nested(data, self._label, where) if self._label else None
        return records.Raw(
            bytes(records.nested(data, self._image, where)),
            records.label_text(label),
            records.texts(caption),
        )

    def _read(self, index: int) -> dict:
        try:
            return self._source[index]
        except RuntimeError as error:  # damaged
            raise ValueError(str(error)) from None


def _builder(tfds: Any, source: config.Tfds) -> Any:
    """Opens the dataset from its files; the code that made it is not needed."""
    if not source.name:
        raise ValueError("the source has no name: set data.train.name")
    where = {}
    if source.data_dir:
        if storage.is_remote(source.data_dir):
            raise ValueError(
                f"TensorFlow datasets must be on this machine, not {source.data_dir!r}"
                ": copy the dataset, or mount the bucket (gcsfuse, mount-s3) and name "
                "its folder"
            )
        where = {"data_dir": str(Path(source.data_dir).expanduser())}
    try:
        return tfds.core.read_only_builder.builder_from_files(source.name, **where)
    except tfds.core.registered.DatasetNotFoundError:
        folder = where.get("data_dir") or tfds.core.constants.DATA_DIR
        raise ValueError(
            f"{source.name} is not prepared in {folder}: set data.train.data_dir to "
            f"where it is, or prepare it: tfds build {source.name} "
            f"--file_format=array_record --data_dir={folder} (preparing needs "
            "TensorFlow, reading does not)"
        ) from None


def _feature(features: Any, path: str, where: str) -> Any:
    for key in path.split("."):
        # A sequence of dicts stands for its dicts.
        while not hasattr(features, "keys") and hasattr(features, "feature"):
            features = features.feature
        names = list(features.keys()) if hasattr(features, "keys") else []
        if key not in names:
            raise ValueError(records.missing(key, sorted(names), where))
        features = features[key]
    return features
