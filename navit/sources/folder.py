"""A folder of photographs, local or behind a URL, with a table."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from navit import config
from navit.sources import karpathy, records, storage
from navit.sources.bucket import is_url
from navit.sources.cache import Place, digest
from navit.sources.index import ALL, Share, measure
from navit.sources.index_join import Index
from navit.sources.index_part import Entry
from navit.sources.local_cache import LocalCache
from navit.sources.missing import check_missing
from navit.sources.source import Record, Task
from navit.sources.table import Listed, inside, is_table, read_table


class _All(NamedTuple):
    """The images of a table that exist, in every split; an unreadable one too."""

    table: str
    listed: list[Listed]
    lengths: list[int]  # in bytes
    measured: Index
    task: Task


class FolderSource:
    """Photographs in a folder, with a table of `file[,caption][,label]`.

    A file may have several rows with a caption each; without a caption, it is captioned
    with the name of its class. The table may also be Karpathy's JSON
    (`navit/sources/karpathy.py`). Sizes come from the sizes index. A file that cannot
    be read is left out, with a warning that names it.

    Raises:
      FileNotFoundError, ValueError: if the folder or table does not exist, the table
        lacks columns, a path is outside the folder, more files are missing than
        `folder.missing` allows, or nothing is left to read.
    """

    def __init__(
        self,
        folder: config.Folder,
        *,
        share: Share = ALL,
        cache: LocalCache | None = None,
    ) -> None:
        path = _path(folder)
        self._storage = storage.open_storage(path, cache)
        remote = is_url(path)
        listing = self._storage.listing(path)
        self._root, table = _find(folder, listing)
        splits = _splits(folder)
        with self._opened(table, self._storage.stat(table).size) as file:
            named = read_table(
                file, table, self._root, splits=splits, missing=folder.missing
            )
        # Classes come from the whole table, so that every split numbers them alike.
        labels = {e.file: records.label_text(e.label) for e in named}
        names = records.sorted_names({*labels.values()} - {""})
        stats = {
            entry.file: stat
            for entry in named
            if (stat := self._stat(entry.file, listing)) is not None
        }
        listed = [entry for entry in named if entry.file in stats]
        absent = [entry.file for entry in named if entry.file not in stats]
        what, remedy = f"files of {table}", "add them, or delete their lines"
        check_missing(absent, len(named), folder.missing, what, remedy)
        place = Place(
            self._root if remote else Path(self._root),
            "#".join([table, *splits]),
            digest([[*stats], [tuple(s) for s in stats.values()]]),
        )
        self._version = digest(place[1:])
        index = measure(
            lambda i: Entry.of(self._image(listed[i].file, stats[listed[i].file].size)),
            lambda i: self._path(listed[i].file),
            len(listed),
            place,
            share=share,
        )
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        ids = [number[labels[entry.file]] for entry in listed]
        lengths = [stats[entry.file].size for entry in listed]
        task = Task(names, np.array(ids, np.int32))
        self._all = _All(table, listed, lengths, index, task)
        self._choose(folder)

    def part(self, folder: config.Folder) -> FolderSource:
        """Another split of the same folder and table, which are not read again."""
        other = copy.copy(self)
        other._choose(folder)
        return other

    def _choose(self, folder: config.Folder) -> None:
        table, listed, lengths, measured, (names, ids) = self._all
        split = {i for i, e in enumerate(listed) if _is_in(folder, e.file)}
        usable = measured.records(np.arange(len(measured.sizes))).tolist()
        places = [place for place, i in enumerate(usable) if i in split]
        kept = [usable[place] for place in places]
        if not kept:
            what = f"{len(split)} unreadable images" if split else "no image"
            raise ValueError(
                f"split={folder.split!r} with holdout={folder.holdout} has {what} of "
                f"{table}: change the holdout or use split='all'"
            )
        self.left_out, self.damaged = len(split) - len(kept), 0
        self._listed = [listed[i] for i in kept]
        self._lengths = [lengths[i] for i in kept]
        self.sizes = np.array(measured.sizes[places])
        self.tasks = {"label": Task(names, ids[kept])} if names else {}

    def __len__(self) -> int:
        return len(self._listed)

    def record(self, index: int) -> Record:
        listed = self._listed[index]
        captions = listed.captions or (self.tasks["label"].name(index),)
        return Record(self._image(listed.file, self._lengths[index]), captions)

    def name(self, index: int) -> str:
        return self._path(self._listed[index].file)

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes, order, captions and labels."""
        rows = [
            [*listed, *map(int, size)]
            for listed, size in zip(self._listed, self.sizes, strict=True)
        ]
        checksum = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return f"{len(rows)} images (table and sizes {checksum[:16]})"

    def version(self) -> str:
        return self._version

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def _opened(self, path: str, size: int) -> BinaryIO:
        read = functools.partial(self._storage.read_range, path)
        return storage.opened(read, size, self._storage.block)

    def _image(self, file: str, size: int) -> str | BinaryIO:
        """A path, as a local file is not kept open, unlike a shard."""
        path = self._path(file)
        if not is_url(path):
            return path
        return storage.open_image(self._storage, path, 0, size, self._storage.block)

    def _stat(
        self, file: str, listing: dict[str, storage.Stat] | None
    ) -> storage.Stat | None:
        """None for a file that does not exist."""
        if listing is not None:
            return listing.get(file)
        try:
            return self._storage.stat(self._path(file))
        except (FileNotFoundError, NotADirectoryError):
            return None


def same_table(one: config.Folder, other: config.Folder) -> bool:
    """Whether both read the same table of the same folder, however it is written.

    Lists a folder only if that decides, as listing a bucket can take minutes.
    """
    if _resolved(_root(one)) != _resolved(_root(other)):
        return False
    if one.table == other.table:
        return True
    some, others = {*_splits(one)}, {*_splits(other)}
    if some and others and not some & others:
        return False
    return _resolved(_table(one)) == _resolved(_table(other))


def _splits(folder: config.Folder) -> tuple[str, ...]:
    """Those of Karpathy's JSON that the table names."""
    return karpathy.parted(folder.table or "")[1]


def _table(folder: config.Folder) -> str:
    if folder.table:
        root, (name, _) = _root(folder), karpathy.parted(folder.table)
        return f"{root}/{inside(root, name, 'table')}"
    path = _path(folder)
    return _find(folder, storage.open_storage(path).listing(path))[1]


def _path(folder: config.Folder) -> str:
    if not folder.path:
        raise FileNotFoundError(
            "the folder has no path: set data.train.path (or data.eval.path) to the "
            "folder with your images, or data.eval=none"
        )
    return folder.path


def _root(folder: config.Folder) -> str:
    """The folder without a trailing slash."""
    path = _path(folder)
    return path.rstrip("/") if is_url(path) else str(Path(path).expanduser())


def _resolved(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())


def _find(
    folder: config.Folder, listing: dict[str, storage.Stat] | None
) -> tuple[str, str]:
    """The folder without a trailing slash, and its table."""
    root = _root(folder)
    if not (listing or Path(root).is_dir()):
        raise FileNotFoundError(
            f"there is no folder {folder.path!r}: set data.train.path (or "
            "data.eval.path) to the folder with your images"
        )
    names = listing or [p.name for p in Path(root).iterdir()]
    if folder.table:
        name, _ = karpathy.parted(folder.table)
        name = inside(root, name, "table")
        if name not in names and not (Path(root) / name).is_file():
            raise FileNotFoundError(_no_table(root, name, names))
        return root, f"{root}/{name}"
    tables = [name for name in names if is_table(name) and "/" not in name]
    if len(tables) != 1:
        what = f"{len(tables)} tables" if tables else "no .csv, .jsonl or .parquet"
        raise FileNotFoundError(
            f"{root} has {what}: write one with the columns file,caption[,label], or "
            "name it with `table` of the source (data.train.table, data.eval.table or "
            "eval.tasks.NAME.source.table)"
        )
    return root, f"{root}/{tables[0]}"


def _no_table(root: str, name: str, names: Iterable[str]) -> str:
    tables = [x for x in names if "/" not in x and (is_table(x) or x.endswith(".json"))]
    known = ", ".join(sorted(tables)[:10]) or "none"
    return f"there is no table {root}/{name.partition('#')[0]}: the folder has {known}"


def _is_in(folder: config.Folder, file: str) -> bool:
    held_out = _hash(file) < folder.holdout
    return folder.split == "all" or held_out == (folder.split == "eval")


def _hash(text: str) -> float:
    """A stable number in [0, 1) for a string."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
