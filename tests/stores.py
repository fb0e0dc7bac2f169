"""An asynchronous object store for fsspec: a folder, with latency and faults."""

import asyncio
from pathlib import Path

import fsspec
from fsspec.asyn import AsyncFileSystem


class Busy(Exception):
    """An HTTP error like aiohttp's, which is not an OSError."""

    status = 503


class Store(AsyncFileSystem):
    """`store://a/b` is the file `a/b` of the folder `Store.root`.

    Attributes:
      latency: seconds before a read is answered.
      faults: what the next reads raise, or None; `hang` waits forever.
      reads: (path, start, size) of each answered read.
      most: the most reads that were in flight together.
    """

    protocol = "store"
    cachable = False
    root = Path()
    latency = 0.0
    hang = Exception("hang")

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.flying = 0

    async def _cat_file(self, path, start=None, end=None, **options):
        kind = type(self)
        self.flying += 1
        kind.most = max(kind.most, self.flying)
        try:
            await asyncio.sleep(kind.latency)
            error = kind.faults.pop(0) if kind.faults else None
            if error is kind.hang:
                await asyncio.sleep(1000)
            if error is not None:
                raise error
        finally:
            self.flying -= 1
        data = self._file(path).read_bytes()[start:end]
        kind.reads.append((self._file(path).name, start or 0, len(data)))
        return data

    async def _info(self, path, **options):
        path = self._strip_protocol(path)
        file = self._file(path)
        status = file.stat()
        kind = "directory" if file.is_dir() else "file"
        return {
            "name": path,
            "size": status.st_size,
            "type": kind,
            "mtime": status.st_mtime_ns,
        }

    async def _ls(self, path, detail=True, **options):
        path = self._strip_protocol(path).rstrip("/")
        files = self._file(path).iterdir()
        infos = [await self._info(f"{path}/{file.name}") for file in files]
        return infos if detail else [info["name"] for info in infos]

    def _file(self, path: str) -> Path:
        return self.root / self._strip_protocol(path)


def serve(monkeypatch, root: Path) -> type[Store]:
    """Makes `store://` this folder, and forgets earlier reads."""
    fsspec.register_implementation("store", Store, clobber=True)
    for name, value in {"root": root, "faults": [], "reads": [], "most": 0}.items():
        monkeypatch.setattr(Store, name, value, raising=False)
    return Store
