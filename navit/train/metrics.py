"""What a run reports: lines on the terminal, and the same numbers in metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from navit.batch import Batch, fill
from navit.files import write_atomic


class MetricsWriter:
    """Appends one JSON object per logged step.

    A resumed run first drops what was logged after the step that it resumes from, so
    that no step stands there twice.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [x for x in lines if _logged(x, start_step)]
        write_atomic(path, "".join(kept if start_step else []).encode())
        self._path = path

    def write(self, metrics: dict[str, float | int]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


class Meter:
    """Counts what went through since it was last read, for rates.

    Attributes:
      unreadable: planned images that could not be read, over the whole run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self.unreadable = 0
        self._restart()

    def add(self, batch: Batch, waited: float) -> None:
        """One host batch, and the seconds that the device waited for the next one."""
        planned = np.asarray(batch.id) >= 0
        found = np.asarray(batch.images.grids)[..., 0] > 0
        self._steps += 1
        self._images += int(found.sum())
        self._rows += len(found)
        self._slots += found.size
        lost = int((planned & ~found).sum())
        self._unreadable += lost
        self.unreadable += lost
        self._tokens += int((batch.images.segment_ids > 0).sum())
        self._fill += fill(batch.images)
        self._waited += waited

    def read(self, step: int) -> dict[str, float | int]:
        """This host's numbers since the last reading; no rates of a compiled step."""
        seconds = time.perf_counter() - self._start
        metrics: dict[str, float | int] = {
            "images_per_step": round(self._images / max(self._steps, 1), 2),
            "images_per_row": round(self._images / max(self._rows, 1), 2),
            "slots_filled": round(self._images / max(self._slots, 1), 4),
            "fill": round(self._fill / max(self._steps, 1), 4),
            "unreadable": self._unreadable,
        }
        counts = (self._steps, self._images, self._tokens)
        steps, images, tokens = (
            now - then for now, then in zip(counts, self._untimed, strict=True)
        )
        if steps:
            metrics |= {
                "images_per_second": round(images / seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
                "input_wait": round(self._waited / seconds, 4),
                "eta_seconds": round(seconds / steps * (self._total_steps - step), 1),
            }
        self._restart()
        return metrics

    def start_clock(self) -> None:
        """What went through so far, the step that was compiled, is part of no rate."""
        self._start, self._waited = time.perf_counter(), 0.0
        self._untimed = (self._steps, self._images, self._tokens)

    def _restart(self) -> None:
        self._steps = self._images = self._unreadable = self._tokens = 0
        self._rows = self._slots = 0
        self._fill = 0.0
        self.start_clock()


def line(metrics: dict[str, float | int], total_steps: int) -> str:
    """One logged step as the terminal shows it."""
    text = f"step {metrics['step']:>6}/{total_steps}  loss {metrics['loss']:8.4f}  "
    if "eta_seconds" in metrics:
        text += (
            f"{metrics['images_per_second']:7.1f} images/s  "
            f"{metrics['tokens_per_second'] / 1e3:7.1f}k tokens/s  "
        )
    text += f"fill {metrics['fill']:6.1%}"
    if "eta_seconds" in metrics:
        minutes, seconds = divmod(int(metrics["eta_seconds"]), 60)
        text += f"  ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if metrics.get("input_wait", 0) >= 0.05:  # else the device is kept busy
        text += f"  waiting for input {metrics['input_wait']:.0%}"
    if metrics["unreadable"]:
        text += f"  unreadable {metrics['unreadable']}"
    return text


def _logged(line: str, until: int) -> bool:
    try:
        return json.loads(line)["step"] <= until
    except (json.JSONDecodeError, KeyError):  # cut short when the run was killed
        return False
