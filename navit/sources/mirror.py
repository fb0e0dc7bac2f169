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

from navit.files import replacing
from navit.sources.bucket import Bucket

log = logging.getLogger("navit")

# The first line of a file of arrays is shorter.
_HEAD = 1 << 16


def put(folder: Path | str | None, root: Path, name: str) -> bool:
    """Copies `ROOT/NAME` to `.navit/NAME` in the data's folder; whether that worked."""
    if (bucket := _bucket(folder)) is None:
        return False
    try:
        bucket.send(root, [name])
        return True
    except OSError as error:
        log.warning("the index cannot be saved beside the data (%s)", error)
        return False


def get(
    folder: Path | str | None, name: str, to: Path, accept: Callable[[bytes], bool]
) -> bool:
    """Copies `.navit/NAME` to `to` if its first bytes are accepted; whether it did."""
    if (bucket := _bucket(folder)) is None:
        return False
    try:
        head = bucket.read(name, stop=_HEAD)
        if head is None or not accept(head):
            return False
        with replacing(to) as temporary:
            bucket.fetch_file(name, temporary)
        return True
    except OSError as error:
        log.warning("the index beside the data cannot be read (%s)", error)
        return False


def numbers(folder: Path | str | None, name: str) -> set[int]:
    """The numbers that are names of files in `.navit/NAME`."""
    if (bucket := _bucket(folder)) is None:
        return set()
    try:
        found = (re.search(r"/(\d+)\.[^/]*$", path) for path in bucket.names(name))
        return {int(match[1]) for match in found if match}
    except OSError as error:
        log.warning("the index beside the data cannot be read (%s)", error)
        return set()


def remove(folder: Path | str | None, name: str) -> None:
    """Removes the folder `.navit/NAME`."""
    if (bucket := _bucket(folder)) is not None:
        with contextlib.suppress(OSError):
            bucket.remove(name)


def is_none(folder: Path | str | None) -> bool:
    """Whether there is no such place beside the data."""
    return not isinstance(folder, str) or bool(re.match("https?://", folder))


def _bucket(folder: Path | str | None) -> Bucket | None:
    return None if is_none(folder) else Bucket(f"{folder}/.navit")
