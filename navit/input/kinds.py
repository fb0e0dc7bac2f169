"""What a config names -> the source that reads it."""

from __future__ import annotations

from navit import config
from navit.input.mixture import MixtureSource
from navit.input.records import Reader, RecordSource
from navit.input.sources import Source


def open_source(source: config.AnySource, *, again: bool = False) -> Source:
    """Opens what a config names; sizes are known from here on.

    Args:
      again: read all headers anew and keep the index, whatever is kept already.
    """
    # Each kind is imported when it is used: some need packages that others do not.
    if isinstance(source, config.Synthetic):
        from navit.input.synthetic import SyntheticSource

        return SyntheticSource(source.size, source.seed)
    if isinstance(source, config.Folder):
        from navit.input.folder import FolderSource

        return FolderSource(source, again=again)
    if isinstance(source, config.Mixture):
        parts = [open_source(part, again=again) for part in source.sources]
        return MixtureSource(parts, source.weights)
    return RecordSource(_open_reader(source, again), again=again)


def _open_reader(source: config.AnySource, again: bool) -> Reader:
    if isinstance(source, config.TarShards):
        from navit.input.tar import TarReader

        return TarReader(source, again=again)
    if isinstance(source, config.ArrayRecords):
        from navit.input.array_record import ArrayRecordReader

        return ArrayRecordReader(source)
    if isinstance(source, config.Tfds):
        from navit.input.tfds import TfdsReader

        return TfdsReader(source)
    if isinstance(source, config.ParquetImages):
        from navit.input.parquet import ParquetReader

        return ParquetReader(source)
    raise ValueError(f"{source!r} is no source of images")
