"""Opens the source that a config names."""

from __future__ import annotations

import dataclasses

from navit import config
from navit.sources.folder import FolderSource
from navit.sources.index import ALL, Share
from navit.sources.local_cache import LocalCache
from navit.sources.mixture import MixtureSource
from navit.sources.records import Reader, RecordSource
from navit.sources.source import Source, no_random_access


class Opener:
    """Opens sources, each only once, so that what it leaves out is also said once.

    The splits of a folder share one reading of its table and files.

    Args:
      share: which headers to read, and whether again if there is an index.
      cache: keeps what is read behind URLs.
    """

    def __init__(self, share: Share = ALL, cache: LocalCache | None = None) -> None:
        self._share, self._cache = share, cache
        self._opened: dict[config.AnySource, Source] = {}
        self._folders: dict[config.Folder, FolderSource] = {}

    def open(self, source: config.AnySource) -> Source:
        """Opens a source; all image sizes are then known.

        Raises:
          ValueError: if its files have no random access, and as its reader does.
        """
        if source not in self._opened:
            self._opened[source] = self._open(source)
        return self._opened[source]

    def _open(self, source: config.AnySource) -> Source:
        # Each kind is imported when it is used: some need packages that others do not.
        if isinstance(source, config.Synthetic):
            from navit.sources.synthetic import SyntheticSource

            return SyntheticSource(
                source.size, source.seed, task=source.task, aspect=source.aspect
            )
        if isinstance(source, config.Folder):
            whole = dataclasses.replace(source, split="all", holdout=0.5)
            if whole in self._folders:
                return self._folders[whole].part(source)
            self._folders[whole] = FolderSource(
                source, share=self._share, cache=self._cache
            )
            return self._folders[whole]
        if isinstance(source, config.Mixture):
            return MixtureSource([*map(self.open, source.sources)], source.weights)
        reader = _open_reader(source, self._share, self._cache)
        return RecordSource(reader, share=self._share)


def open_source(source: config.AnySource) -> Source:
    """Opens one source of a config, such as `navit.config.Folder(path)`.

    Returns:
      Records by index, with `sizes` and `tasks` (`navit/sources/source.py`).

    Raises:
      TypeError: if `source` is not a source of a config.
      ValueError: as `Opener.open` does.
    """
    return Opener().open(source)


def _open_reader(
    source: config.AnySource, share: Share, cache: LocalCache | None
) -> Reader:
    if isinstance(source, config.TarShards):
        from navit.sources.tar import TarReader

        return TarReader(source, share=share, cache=cache)
    if isinstance(source, config.TfRecords):
        raise ValueError(no_random_access(f"{source.path} is TFRecord, which", source))
    if isinstance(source, config.ArrayRecords):
        from navit.sources.array_record import ArrayRecordReader

        return ArrayRecordReader(source, cache)
    if isinstance(source, config.Tfds):
        from navit.sources.tfds import TfdsReader

        return TfdsReader(source, cache)
    if isinstance(source, config.ParquetImages):
        from navit.sources.parquet import ParquetReader

        return ParquetReader(source, cache)
    raise TypeError(
        f"{source!r} is not a source of images: pass one of navit.config, such as "
        "Folder(path)"
    )
