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
        self.restart()

    def add(self, batch: Batch, waited: float) -> None:
        """One host batch, and the seconds that the device's feeder waited for it."""
        planned = np.asarray(batch.id) >= 0
        found = np.asarray(batch.images.grids)[..., 0] > 0
        self._steps += 1
        self._images += int(found.sum())
        lost = int((planned & ~found).sum())
        self._unreadable += lost
        self.unreadable += lost
        self._tokens += int((batch.images.segment_ids > 0).sum())
        self._fill += fill(batch.images)
        self._waited += waited

    def read(self, step: int) -> dict[str, float | int]:
        """This host's numbers since the last reading."""
        seconds = time.perf_counter() - self._start
        steps = max(self._steps, 1)
        metrics = {
            "images_per_second": round(self._images / seconds, 2),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "images_per_step": round(self._images / steps, 2),
            "fill": round(self._fill / steps, 4),
            "unreadable": self._unreadable,
            "input_wait": round(self._waited / seconds, 4),
            "eta_seconds": round(seconds / steps * (self._total_steps - step), 1),
        }
        self.restart()
        return metrics

    def restart(self) -> None:
        """Forgets what went through, as after the step that was compiled."""
        self._start = time.perf_counter()
        self._steps = self._images = self._unreadable = self._tokens = 0
        self._fill = self._waited = 0.0


def line(metrics: dict[str, float | int], total_steps: int) -> str:
    """One logged step as the terminal shows it."""
    minutes, seconds = divmod(int(metrics["eta_seconds"]), 60)
    text = (
        f"step {metrics['step']:>6}/{total_steps}  loss {metrics['loss']:8.4f}  "
        f"{metrics['images_per_second']:7.1f} images/s  "
        f"{metrics['tokens_per_second'] / 1e3:7.1f}k tokens/s  "
        f"fill {metrics['fill']:6.1%}  "
        f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )
    if metrics["unreadable"]:
        text += f"  unreadable {metrics['unreadable']}"
    return text


def _logged(line: str, until: int) -> bool:
    try:
        return json.loads(line)["step"] <= until
    except (json.JSONDecodeError, KeyError):  # cut short when the run was killed
        return False
