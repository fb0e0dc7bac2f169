"""Reads prepared TensorFlow datasets, without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit import config
from navit.files import write_atomic
from navit.sources import records, storage
from navit.sources.bucket import is_url
from navit.sources.cache import Place, digest
from navit.sources.cached_records import CachedRecords, Span
from navit.sources.local_cache import LocalCache
from navit.sources.names import class_names
from navit.sources.source import no_random_access
from navit.sources.table import inside

_FORMATS = ("array_record", "parquet")


class Prepared:
    """One split of a prepared dataset, as the files that describe it say.

    Those of a dataset behind a URL are copied to the local cache.

    Attributes:
      stored: the format of the records, such as "tfrecord".
      where: names the dataset in messages.
      caption, label: features, as `records.choose` chooses them.
      files: those of the whole split, paths or URLs.
      spans: the split's records, file by file.

    Raises:
      ValueError: if tensorflow_datasets is not installed, the dataset is not prepared
        or lacks the split or a feature, or if it is behind a URL and there is no cache.
    """

    def __init__(self, source: config.Tfds, cache: LocalCache | None = None) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise ValueError(
                f"the dataset {source.name!r} needs tensorflow_datasets: pip install "
                "tensorflow-datasets (TensorFlow is not needed)"
            ) from None
        self.remote = is_url(source.data_dir or "")
        folder = _mirrored(source, cache) if self.remote else source.data_dir
        self.builder = _builder(tfds, source, folder)
        info, place = self.builder.info, str(self.builder.data_path)
        self.stored: str = info.file_format.file_suffix
        where = f"{source.name} in {source.data_dir if self.remote else place}"
        self.where = where
        self.caption, self.label = records.choose(
            source, info.features, where, deep=True
        )
        for path in filter(None, (source.image, self.caption, self.label)):
            _feature(info.features, path, where)
        image = _feature(info.features, source.image, where)
        if not isinstance(image, tfds.features.Image):
            raise ValueError(f"{where}: the feature {source.image!r} is not an image")
        self.classes = class_names(source.classes)
        if self.label:
            label = _feature(info.features, self.label, where)
            if isinstance(label, tfds.features.ClassLabel):
                names = tuple(label.names)
                if self.classes and len(self.classes) != len(names):
                    raise ValueError(
                        f"{source.classes} names {len(self.classes)} classes, and "
                        f"{where} has {len(names)}"
                    )
                self.classes = self.classes or names
        self.split = info.splits[source.split]
        if self.remote:
            assert folder is not None and source.data_dir is not None
            place = source.data_dir.rstrip("/") + place[len(folder) :]
        self.files = [f"{place}/{file.name}" for file in self.split.filepaths]
        self.spans = [
            Span(f"{place}/{Path(part.filename).name}", part.skip, part.take)
            for part in self.split.file_instructions
        ]


class TfdsReader:
    """The records of one split.

    Files behind a URL are read through a local cache.

    Raises:
      ValueError: as `Prepared` does; and if the dataset has no random access, or is
        behind a URL and not stored as ArrayRecord.
    """

    def __init__(self, source: config.Tfds, cache: LocalCache | None = None) -> None:
        dataset = Prepared(source, cache)
        where, stored, split = dataset.where, dataset.stored, dataset.split
        if stored not in _FORMATS:
            what = f"{where} is stored as {stored}, which"
            raise ValueError(no_random_access(what, source))
        if dataset.remote and stored != "array_record":
            raise ValueError(
                f"{where} is stored as {stored}; behind a URL it must be ArrayRecord: "
                f"tfds build {source.name} --file_format=array_record"
            )
        self._image, self.classes = source.image, dataset.classes
        self._caption, self._label = dataset.caption, dataset.label
        self.damaged: list[str] = []
        from tensorflow_datasets import decode

        decoders: Any = decode.SkipDecoding()
        for key in reversed(self._image.split(".")):
            decoders = {key: decoders}
        self._source = dataset.builder.as_data_source(source.split, decoders=decoders)
        if len(self._source) != split.num_examples:  # TFDS cannot cut Parquet
            raise ValueError(
                f"{where}: split={source.split!r} has {split.num_examples} examples, "
                f"and reading {stored} gives {len(self._source)}: name a whole split, "
                "or build the dataset with --file_format=array_record"
            )
        self._name = f"{source.name} {source.split}"
        stored_at = storage.open_storage(dataset.files[0], cache)
        if dataset.remote:
            self._source.data_source = CachedRecords(stored_at, dataset.spans)
        pairs = zip(
            dataset.files, storage.stats_of(stored_at, dataset.files), strict=True
        )
        stats = [(Path(file).name, stat) for file, stat in pairs]
        self.place = Place(
            None if dataset.remote else Path(str(dataset.builder.data_path)),
            f"{where}, split {source.split} (image {self._image}, caption "
            f"{self._caption or 'none'}, label {self._label or 'none'})",
            digest([[(name, *stat) for name, stat in stats]]),
        )

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"{self._name}: record {index}"

    def record(self, index: int) -> records.Raw:
        return self.neighbours([index])[0]

    def neighbours(self, indices: Sequence[int]) -> list[records.Raw]:
        try:
            read = self._source.__getitems__(list(indices))
        except RuntimeError as error:  # damaged
            raise ValueError(str(error)) from None
        return [self._raw(i, data) for i, data in zip(indices, read, strict=True)]

    def _raw(self, index: int, data: dict) -> records.Raw:
        where = self.name(index)
        caption = records.nested(data, self._caption, where) if self._caption else None
        label = records.nested(data, self._label, where) if self._label else None
        return records.Raw(
            bytes(records.nested(data, self._image, where)),
            records.label_text(label),
            records.texts(caption),
        )


def _mirrored(source: config.Tfds, cache: LocalCache | None) -> str:
    """Copies what describes a dataset behind a URL, its records aside; to where."""
    url = (source.data_dir or "").rstrip("/")
    if cache is None:
        raise ValueError(
            f"the dataset in {url!r} must be copied to this machine to be read: set "
            "data.cache to a folder for copies (--cache of navit reshard), or mount "
            "the bucket (gcsfuse, mount-s3) and name its folder"
        )
    stored = storage.open_storage(url)
    root = cache.folder / "tfds" / digest([url])[:16]
    name = source.name.partition(":")[0]
    for path, stat in (stored.listing(f"{url}/{name}") or {}).items():
        if path.endswith((".json", ".txt")):
            data = stored.read_range(f"{url}/{name}/{path}", 0, stat.size)
            write_atomic(root / inside(str(root), f"{name}/{path}", "dataset"), data)
    return str(root)


def _builder(tfds: Any, source: config.Tfds, folder: str | None) -> Any:
    """Opens the dataset from its files; the code that made it is not needed."""
    if not source.name:
        raise ValueError("the source has no name: set data.train.name")
    where = {}
    if folder:
        where = {"data_dir": str(Path(folder).expanduser())}
    try:
        return tfds.core.read_only_builder.builder_from_files(source.name, **where)
    except tfds.core.registered.DatasetNotFoundError:
        folder = source.data_dir or tfds.core.constants.DATA_DIR
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
