"""A small object store on this machine: HTTP ranges, with the faults of a real one.

Every request waits, some fail, and no more than so many are answered in a second.
"""

from __future__ import annotations

import contextlib
import http.server
import multiprocessing
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Faults(NamedTuple):
    """How the store behaves.

    Attributes:
      latency: seconds before a request is answered.
      errors: share of the requests that are answered with 503.
      per_second: requests that are answered in a second.
    """

    latency: float = 0.03
    errors: float = 0.01
    per_second: float = 1000.0


_USUAL = Faults()


class Counts(NamedTuple):
    """What was asked for: requests, failures among them, and bytes sent."""

    requests: int
    failed: int
    sent: int


class Store(NamedTuple):
    """A running store: its address, and what it has been asked for."""

    url: str
    pipe: Connection

    def counts(self) -> Counts:
        """Counts since the last call."""
        self.pipe.send("counts")
        return self.pipe.recv()


@contextlib.contextmanager
def serve(folder: Path, faults: Faults = _USUAL) -> Iterator[Store]:
    """Serves the files of a folder from another process."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(folder, faults, theirs), daemon=True)
    process.start()
    try:
        yield Store(f"http://127.0.0.1:{ours.recv()}", ours)
    finally:
        process.terminate()
        process.join()


def _run(folder: Path, faults: Faults, pipe: Connection) -> None:
    lock, rng = threading.Lock(), random.Random(0)
    counts = {"requests": 0, "failed": 0, "sent": 0}
    free_at = [0.0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            with lock:  # one request after the other gets its turn
                now = time.monotonic()
                free_at[0] = max(now, free_at[0]) + 1 / faults.per_second
                wait = free_at[0] - now + faults.latency
                fails = rng.random() < faults.errors
                counts["requests"] += 1
                counts["failed"] += fails
            time.sleep(wait)
            path = folder / urllib.parse.unquote(self.path).lstrip("/")
            if fails or not path.is_file() or folder not in path.parents:
                self.send_response(503 if fails else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            stop = min(size, int(asked[2]) + 1) if asked and asked[2] else size
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            if self.command == "HEAD":
                return
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            with lock:
                counts["sent"] += len(data)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_address[1])
    while pipe.recv() == "counts":
        with lock:
            pipe.send(Counts(**counts))
            counts.update(requests=0, failed=0, sent=0)
