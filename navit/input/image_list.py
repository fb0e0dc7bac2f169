"""The images that `navit embed` takes: files, folders, tables, tars, a list."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from navit import config
from navit.sources import storage, table, tar
from navit.sources.bucket import is_url
from navit.sources.local_cache import LocalCache
from navit.sources.tar_fields import IMAGES


class Named(NamedTuple):
    """An image that is opened on demand."""

    name: str
    open: Callable[[], BinaryIO]


def images_of(
    arguments: Sequence[str],
    lines: Iterable[str] = (),
    *,
    must_exist: bool = True,
    cache: LocalCache | None = None,
) -> list[Named]:
    """The images that the arguments stand for, in order.

    Args:
      arguments: image files; folders, for all images in and below them, sorted;
        tables, for the files that they name; tars and patterns of tars; "-", for
        arguments from `lines`. Files and folders may be URLs.
      must_exist: whether a missing file is an error here or only when it is opened.
      cache: keeps what is read behind URLs.

    Raises:
      FileNotFoundError, ValueError: for an argument that is missing or has no image.
    """
    images: list[Named] = []
    for argument in arguments:
        remote, suffix = is_url(argument), _suffix(argument)
        if argument == "-":
            listed = [name for line in lines if (name := line.rstrip("\r\n"))]
            images += images_of(listed, must_exist=must_exist, cache=cache)
        elif os.path.isdir(argument):
            images += _in_folder(argument, cache)
        elif suffix == "tar":
            shards = config.TarShards(argument)
            reader = tar.TarReader(shards, texts=False, cache=cache)
            for i in range(len(reader)):
                opened = functools.partial(reader.open_image, i)
                images.append(Named(reader.name(i), opened))
        elif table.is_table(argument):
            root = argument.rpartition("/")[0] or ("/" if argument[0] == "/" else ".")
            with _open(argument, cache) as file:
                names = table.read_files(file, argument, root)
            images += [_file(_joined(root, name), cache) for name in names]
        elif remote and suffix not in IMAGES:
            images += _in_folder(argument, cache)
        elif must_exist and not remote and not os.path.exists(argument):
            raise FileNotFoundError(f"there is no file {argument}")
        else:
            images.append(_file(argument, cache))
    return images


def _in_folder(folder: str, cache: LocalCache | None) -> list[Named]:
    listing = storage.open_storage(folder).listing(folder)
    local = [
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in (os.walk(folder) if listing is None else ())
        for name in names
    ]
    images = sorted(x for x in listing or local if _suffix(x) in IMAGES)
    if not images:
        raise ValueError(
            f"{folder} has no image file ({', '.join(IMAGES)}); name tars "
            "themselves, as FOLDER/*.tar"
        )
    return [_file(_joined(folder, name), cache) for name in images]


def _joined(folder: str, name: str) -> str:
    if is_url(folder):
        return f"{folder.rstrip('/')}/{name}"
    return str(Path(folder) / name)


def _file(path: str, cache: LocalCache | None) -> Named:
    return Named(path, functools.partial(_open, path, cache))


def _open(path: str, cache: LocalCache | None) -> BinaryIO:
    if not is_url(path):
        return storage.open_file(path)
    opened = storage.open_storage(path, cache)
    size = opened.stat(path).size
    return storage.open_image(opened, path, 0, size, opened.block)


def _suffix(path: str) -> str:
    return path.rpartition(".")[2].lower()
