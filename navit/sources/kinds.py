"""Opens the source that a config names."""

from __future__ import annotations

from navit import config
from navit.sources.mixture import MixtureSource
from navit.sources.records import Reader, RecordSource
from navit.sources.source import Source
from navit.sources.stream import StreamSource


def open_train_source(source: config.TrainSource) -> Source | StreamSource:
    """Opens a source to train on, which need not have random access."""
    if isinstance(source, config.Stream):
        return StreamSource(source)
    return open_source(source)


def open_source(source: config.TrainSource, *, again: bool = False) -> Source:
    """Opens a source with random access; all image sizes are then known.

    Args:
      again: read all headers again and save the index, even if there is one.

    Raises:
      ValueError: for a stream, which has no random access.
    """
    if isinstance(source, config.Stream):
        raise ValueError(
            f"the stream {source.path!r} has no random access, which this needs: use "
            "plain tar shards (TarShards) or ArrayRecord files; only `navit train` "
            "reads a stream, as data.train"
        )
    # Each kind is imported when it is used: some need packages that others do not.
    if isinstance(source, config.Synthetic):
        from navit.sources.synthetic import SyntheticSource

        return SyntheticSource(source.size, source.seed)
    if isinstance(source, config.Folder):
        from navit.sources.folder import FolderSource

        return FolderSource(source, again=again)
    if isinstance(source, config.Mixture):
        parts = [open_source(part, again=again) for part in source.sources]
        return MixtureSource(parts, source.weights)
    return RecordSource(_open_reader(source, again), again=again)


def _open_reader(source: config.TrainSource, again: bool) -> Reader:
    if isinstance(source, config.TarShards):
        from navit.sources.tar import TarReader

        return TarReader(source, again=again)
    if isinstance(source, config.ArrayRecords):
        from navit.sources.array_record import ArrayRecordReader

        return ArrayRecordReader(source)
    if isinstance(source, config.Tfds):
        from navit.sources.tfds import TfdsReader

        return TfdsReader(source)
    if isinstance(source, config.ParquetImages):
        from navit.sources.parquet import ParquetReader

        return ParquetReader(source)
    raise ValueError(f"{source!r} is not a source of images")
