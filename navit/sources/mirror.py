"""Files of an index beside data behind a URL, for other hosts to copy.

Nothing here stops a run: what cannot be read or written is logged, and each host makes
its own index. Servers of plain `http` are not asked, as nothing can be written there.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navit.files import replacing

log = logging.getLogger("navit")

# The first line of a file of arrays is shorter.
_HEAD = 1 << 16


def put(folder: Path | str | None, path: Path, name: str) -> bool:
    """Copies a file to `.navit/NAME` in the data's folder; whether that worked."""
    if (at := _place(folder)) is None:
        return False
    files, root = at
    try:
        with contextlib.suppress(NotImplementedError):  # buckets have no folders
            files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.put_file(str(path), f"{root}/{name}")
        return True
    except Exception as error:  # each file system has errors of its own
        log.warning("the index cannot be saved beside the data (%s)", error)
        return False


def get(
    folder: Path | str | None, name: str, to: Path, accept: Callable[[bytes], bool]
) -> bool:
    """Copies `.navit/NAME` to `to` if its first bytes are accepted; whether it did."""
    if (at := _place(folder)) is None:
        return False
    files, root = at
    try:
        if not accept(files.cat_file(f"{root}/{name}", start=0, end=_HEAD)):
            return False
        with replacing(to) as temporary:
            files.get_file(f"{root}/{name}", str(temporary))
        return True
    except FileNotFoundError:
        return False
    except Exception as error:
        log.warning("the index beside the data cannot be read (%s)", error)
        return False


def numbers(folder: Path | str | None, name: str) -> set[int]:
    """The numbers that are names of files in `.navit/NAME`."""
    if (at := _place(folder)) is None:
        return set()
    files, root = at
    try:
        files.invalidate_cache()
        listed = files.ls(f"{root}/{name}", detail=False)
    except FileNotFoundError:
        return set()
    except Exception as error:
        log.warning("the index beside the data cannot be read (%s)", error)
        return set()
    found = (re.search(r"/(\d+)\.[^/]*$", path) for path in listed)
    return {int(match[1]) for match in found if match}


def remove(folder: Path | str | None, name: str) -> None:
    """Removes the folder `.navit/NAME`."""
    if (at := _place(folder)) is not None:
        files, root = at
        with contextlib.suppress(Exception):
            files.rm(f"{root}/{name}", recursive=True)


def is_none(folder: Path | str | None) -> bool:
    """Whether there is no such place beside the data."""
    return not isinstance(folder, str) or bool(re.match("https?://", folder))


def _place(folder: Path | str | None) -> tuple[Any, str] | None:
    if is_none(folder):
        return None
    import fsspec

    return fsspec.core.url_to_fs(f"{folder}/.navit")
