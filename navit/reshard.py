"""`navit reshard`: any source -> plain tar shards, which have random access.

Which records a shard has depends only on the source and on the number of images in a
shard. So several processes share the work, and finished shards are not written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from navit import config
from navit.files import replacing, write_atomic
from navit.sources import in_order, summary
from navit.sources.bucket import Bucket, check_writable, is_url
from navit.sources.images import open_image
from navit.sources.in_order import Sample
from navit.sources.index import ALL, Share, Unfinished
from navit.sources.index_part import reason
from navit.sources.kinds import Opener
from navit.sources.local_cache import LocalCache
from navit.sources.pieces import Advance, Piece, pieces_of
from navit.sources.tar_fields import COMPRESSED, IMAGES

log = logging.getLogger("navit")

# In the folder of the shards: what they are made of, and a report of each piece.
_MADE_OF, _REPORTS = ".navit/reshard.json", ".navit/reshard"

# Reports that are read at the same time.
_THREADS = 32

# At most this many records are named in the log.
_NAMED = 10


class Report(NamedTuple):
    """What a piece became: its shards and images, and what could not be used."""

    shards: int
    images: int
    left_out: list[str]
    damage: str


def reshard(
    source: config.AnySource,
    out: str,
    *,
    images: int = 2000,
    share: Share = ALL,
    cache: LocalCache | None = None,
) -> config.TarShards:
    """Writes tar shards of at most `images` images each, and makes their sizes index.

    The samples of tars keep their keys and all their members. Other records become
    KEY.jpg (or .png and so on), with KEY.txt for a caption or KEY.json for several, and
    KEY.cls for a label. Names of classes go to classes.json. No image is decoded.

    Args:
      out: a folder or a URL.
      share: which of how many processes this is; all run the same call.
      cache: keeps copies of files behind a URL that can only be read on this machine.

    Returns:
      The source of the shards.

    Raises:
      FileNotFoundError, ValueError: if the source cannot be opened, no record of it can
        be used, or `out` holds shards of something else.
      OSError: if a file cannot be read or written.
      Unfinished: if other processes have not written their shards yet.
    """
    if images < 1:
        raise ValueError(f"a shard needs 1 image or more, not {images}")
    folder, work = _Folder(out), pieces_of(source, images, cache)
    present = folder.names()
    given = source
    if isinstance(source, config.TarShards):  # its other fields change no shard
        given = config.TarShards(source.path)
    made_of = {"source": repr(given), "images": images, "data": work.version}
    _check(folder, present, made_of)
    numbers = range(share.process, len(work.pieces), share.processes)
    todo = [n for n in numbers if _report(n) not in present]
    sizes = [piece.size for piece in work.pieces]
    if len(todo) < len(numbers):
        done = len(numbers) - len(todo)
        log.info("resharding resumes after %d of %d parts", done, len(numbers))
    with tqdm(
        total=sum(sizes[n] for n in numbers),
        initial=sum(sizes[n] for n in {*numbers} - {*todo}),
        desc="resharding",
        unit=work.unit,
        unit_scale=True,
        delay=2,
    ) as bar:
        written, named = 0, 0
        digits = max(5, len(str(len(sizes) - 1)))
        for n in todo:
            prefix = f"{n:0{digits}d}"
            report = _written(
                work.pieces[n], prefix, folder, images, present, bar.update
            )
            for line in report.left_out[: _NAMED - named]:
                log.warning("left out: %s", line)
            named = min(_NAMED, named + len(report.left_out))
            if report.damage:
                log.warning("damaged, used up to the damage: %s", report.damage)
            folder.write(_report(n), json.dumps(report._asdict()))
            written += report.images
            bar.set_postfix(images=written, refresh=False)
    return _finished(source, work.classes, len(sizes), folder, share)


def _check(folder: _Folder, present: set[str], made_of: dict) -> None:
    """Notes what the shards are made of; raises ValueError if it is something else."""
    text = folder.read(_MADE_OF)
    if text is None:
        tars = (x for x in present if x.endswith((".tar", *COMPRESSED)))
        if strange := sorted(x for x in tars if "/" not in x):
            raise ValueError(
                f"{folder.out} already has {strange[0]}: name an empty or a new folder"
            )
        folder.write(_MADE_OF, json.dumps(made_of, indent=1))
        return
    for key, value in json.loads(text).items():
        if made_of[key] != value:
            raise ValueError(
                f"{folder.out} holds shards with {key}={value}, and this has {key}="
                f"{made_of[key]}: name another folder, or delete that one"
            )


def _written(
    piece: Piece,
    prefix: str,
    folder: _Folder,
    images: int,
    present: set[str],
    advance: Advance,
) -> Report:
    """Writes the shards of a piece, but not those that are `present`."""
    left_out: list[str] = []
    damage: list[str] = []
    usable = _usable(piece, advance, left_out, damage)
    shards = count = 0
    while (first := next(usable, None)) is not None:
        name, keys = f"{prefix}-{shards:05d}.tar", set[str]()
        with contextlib.ExitStack() as stack:
            tar = None
            if name not in present:
                path = stack.enter_context(folder.file(name))
                tar = stack.enter_context(tarfile.open(path, "w"))
            rest = itertools.islice(usable, images - 1)
            for sample in itertools.chain([first], rest):
                if sample.key in keys:
                    left_out.append(f"{piece.name}: {sample.key}: its key comes twice")
                    continue
                keys.add(sample.key)
                count += 1
                if tar is not None:
                    _add(tar, sample)
        shards += 1
    return Report(shards, count, left_out, "".join(damage))


def _usable(
    piece: Piece, advance: Advance, left_out: list[str], damage: list[str]
) -> Iterator[Sample]:
    """The samples that can be used; adds to the lists what cannot."""
    try:
        for sample in piece.samples(advance):
            if error := sample.error or _fault(sample):
                where = filter(None, (piece.name, sample.key, error))
                left_out.append(": ".join(where))
            else:
                yield sample
    except in_order.DAMAGE as error:
        checksum = "CRC" in str(error)  # gzip's, of all that was read
        anywhere = "; the damage may lie in any image of it" if checksum else ""
        damage.append(f"{piece.name}: {reason(error)}{anywhere}")


def _fault(sample: Sample) -> str:
    """Why a sample cannot be used; empty if it can."""
    path = PurePosixPath(sample.key)
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of a folder"
    contents = sample.members.items()
    image = next((data for suffix, data in contents if suffix in IMAGES), None)
    if image is None:
        return "it has no image"
    try:
        open_image(image)
    except ValueError as error:
        return reason(error)
    return ""


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, data in sample.members.items():
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _finished(
    source: config.AnySource,
    classes: tuple[str, ...],
    count: int,
    folder: _Folder,
    share: Share,
) -> config.TarShards:
    """Reads all reports, and opens the shards, which makes the index."""
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = list(pool.map(lambda n: folder.read(_report(n)), range(count)))
    reports = [Report(**json.loads(text)) for text in texts if text is not None]
    if len(reports) < count:
        raise Unfinished(
            f"process {share.process} of {share.processes} is done, and others are "
            f"not: {len(reports)} of {count} parts are in {folder.out}. The process "
            "that finishes last makes the index"
        )
    written = sum(report.images for report in reports)
    left_out = [line for report in reports for line in report.left_out]
    damaged = [report.damage for report in reports if report.damage]
    if not written:
        first, *_ = [*left_out, *damaged, "it has no samples"]
        raise ValueError(f"not one record of {source} can be used: {first}")
    if isinstance(source, config.TarShards):
        shards = dataclasses.replace(source, path=folder.out, missing=0.0)
    else:
        shards = config.TarShards(folder.out)
    if classes:
        file = f"{folder.out}/classes.json"
        folder.write("classes.json", json.dumps(classes, indent=0))
        if is_url(folder.out):
            log.info(
                "%s names the classes: copy it to this machine, and set classes= "
                "to the copy",
                file,
            )
        else:
            shards = dataclasses.replace(shards, classes=file)
    made = sum(report.shards for report in reports)
    log.info("wrote %d images in %d shards to %s", written, made, folder.out)
    if left_out or damaged:
        log.warning(
            "%d records are left out, and the rest of %d damaged files; %s/%s lists "
            "them",
            len(left_out),
            len(damaged),
            folder.out,
            _REPORTS,
        )
    opened = Opener(Share(publish=True)).open(shards)
    if len(opened) + opened.left_out != written:
        raise ValueError(
            f"{folder.out} has {len(opened) + opened.left_out} images, and {written} "
            "were written: delete it, and run the command again"
        )
    folder.clean()
    log.info("%s", summary.describe(folder.out, opened))
    return shards


def _report(number: int) -> str:
    return f"{_REPORTS}/{number}.json"


class _Folder:
    """Where the shards go: a folder on this machine or behind a URL."""

    def __init__(self, out: str) -> None:
        check_writable(out)
        self.out = out.rstrip("/")
        self._bucket = Bucket(out) if is_url(out) else None
        self._root = Path(out).expanduser()

    def names(self) -> set[str]:
        """The files below, named from the folder."""
        if self._bucket is not None:
            return {*self._bucket.names()}
        files = (path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix() for path in files}

    def read(self, name: str) -> str | None:
        """None if there is no such file."""
        if self._bucket is not None:
            data = self._bucket.read(name)
            return None if data is None else data.decode()
        try:
            return (self._root / name).read_text()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        if self._bucket is not None:
            self._bucket.write(name, text.encode())
        else:
            write_atomic(self._root / name, text.encode())

    def clean(self) -> None:
        """Deletes what killed processes had begun to write; call it after the last."""
        if self._bucket is None:
            for path in self._root.glob(".*.tar.*/"):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write a file to, which then appears as a whole."""
        if self._bucket is None:
            with replacing(self._root / name) as path:
                yield path
            return
        with tempfile.TemporaryDirectory() as made:
            yield Path(made) / name
            self._bucket.send(Path(made), [name])
