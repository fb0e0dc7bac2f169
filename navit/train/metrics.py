"""The metrics of a run: lines on the terminal and the same in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import jax
import numpy as np

from navit.batch import Batch
from navit.config import Config
from navit.files import write_atomic
from navit.model import flops
from navit.train import hosts

Values = dict[str, float | int]


class MetricsWriter:
    """Appends one JSON object per logged step.

    A resumed run first drops what was logged after the step that it resumes from, so
    that no step appears twice.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [x for x in lines if _logged(x, start_step)]
        write_atomic(path, "".join(kept if start_step else []).encode())
        self._path = path

    def write(self, metrics: Values) -> None:
        """Leaves out what JSON cannot hold: the loss of an update that was left out."""
        metrics = {name: x for name, x in metrics.items() if math.isfinite(x)}
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        pass


# What is counted in each batch.
_NAMES = (
    "images",
    "segments",
    "rows",
    "slots",
    "tokens",
    "places",
    "squares",
    "window_squares",
    "unreadable",
)


class Meter:
    """Counts images, tokens and time since the last reading.

    Attributes:
      unreadable: ids of the images that this host could not read, over the whole run.
    """

    def __init__(self, config: Config, devices: int) -> None:
        """Args: devices: how many devices train."""
        self._config, self._devices = config, devices
        self.unreadable: set[int] = set()
        self._restart()

    def add(self, batch: Batch, waited: float) -> None:
        """Counts a host batch; `waited` is how long the device waited for the next."""
        planned = np.asarray(batch.id) >= 0
        filled = np.asarray(batch.images.grids)[..., 0] > 0
        lengths = _lengths(np.asarray(batch.images.segment_ids), filled.shape[1])
        unreadable = np.unique(np.asarray(batch.id)[planned & ~filled])
        self._steps += 1
        self._counts += [
            _images(batch, filled),
            int(filled.sum()),
            len(filled),
            filled.size,
            int(lengths.sum()),
            batch.images.segment_ids.size,
            int((lengths**2).sum()),
            flops.window_squares(self._config.model, np.asarray(batch.images.grids)),
            unreadable.size,
        ]
        self._waited += waited
        self.unreadable.update(unreadable.tolist())

    def read(self, step: int) -> Values:
        """All hosts' metrics since the last reading; the rates leave out compilation.

        Collective: every host calls it at the same step.
        """
        seconds = time.perf_counter() - self._start
        timed_steps = self._steps - self._untimed_steps
        waited = [int(1e6 * self._waited)]
        sent = np.concatenate([self._counts, self._counts - self._untimed, waited])
        gathered = hosts.gather(sent)
        whole, timed = gathered.sum(0)[:-1].reshape(2, -1).tolist()
        n = dict(zip(_NAMES, whole, strict=True))
        metrics: Values = {
            "images_per_step": round(n["images"] / max(self._steps, 1), 2),
            "images_per_row": round(n["images"] / max(n["rows"], 1), 2),
            "slots_filled": round(n["segments"] / max(n["slots"], 1), 4),
            "fill": round(n["tokens"] / max(n["places"], 1), 4),
            "unreadable": n["unreadable"],
        }
        if timed_steps:
            n = dict(zip(_NAMES, timed, strict=True))
            left = self._config.train.steps - step
            metrics |= {
                "seconds_per_step": round(seconds / timed_steps, 4),
                "images_per_second": round(n["images"] / seconds, 2),
                "tokens_per_second": round(n["tokens"] / seconds, 1),
                # Of the slowest host, since all wait for it.
                "input_wait": round(int(gathered[:, -1].max()) / 1e6 / seconds, 4),
                "eta_seconds": round(seconds / timed_steps * left, 1),
                **self._utilization(n, timed_steps, seconds),
            }
        self._restart()
        return metrics | _memory()

    def start_clock(self) -> None:
        """Leaves what was counted so far out of the rates, as for a compiled step."""
        self._start, self._waited = time.perf_counter(), 0.0
        self._untimed_steps, self._untimed = self._steps, self._counts.copy()

    def _utilization(self, n: dict[str, int], steps: int, seconds: float) -> Values:
        """Model FLOP/s, and their share of the devices' peak."""
        pairs = round(n["images"] ** 2 / steps)  # batches differ little
        counts = flops.Counts(
            n["tokens"],
            n["squares"],
            n["segments"],
            window_squares=n["window_squares"],
        )
        if self._config.train.needs("text_tower"):
            counts = counts._replace(captions=n["images"], pairs=pairs)
        rate = flops.train_step(self._config, counts).total / seconds
        peak = flops.peak(jax.devices()[0].device_kind)
        values: Values = {"model_tflops_per_second": float(f"{rate / 1e12:.4g}")}
        if peak is not None:
            values["mfu"] = round(rate / (peak * self._devices), 4)
        return values

    def _restart(self) -> None:
        self._steps, self._counts = 0, np.zeros(len(_NAMES), np.int64)
        self.start_clock()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def line(metrics: Values, total_steps: int) -> str:
    """Formats a logged step for the terminal."""
    text = f"step {metrics['step']:>6}/{total_steps}  loss {metrics['loss']:8.4f}  "
    if "eta_seconds" in metrics:
        text += (
            f"{metrics['images_per_second']:7.1f} images/s  "
            f"{metrics['tokens_per_second'] / 1e3:7.1f}k tokens/s  "
        )
    text += f"fill {metrics['fill']:6.1%}"
    if "mfu" in metrics:
        text += f"  MFU {metrics['mfu']:5.1%}"
    if "eta_seconds" in metrics:
        text += f"  ETA {clock(metrics['eta_seconds'])}"
    if metrics.get("input_wait", 0) >= 0.05:  # below, the device is busy
        text += f"  waiting for input {metrics['input_wait']:.0%}"
    if metrics.get("skipped"):
        text += f"  updates left out {metrics['skipped']}"
    if metrics["unreadable"]:
        text += f"  unreadable {metrics['unreadable']}"
    return text


def _images(batch: Batch, filled: np.ndarray) -> int:
    """The images in a batch, each of which has one or more views.

    Args:
      filled: `[b, s]` whether a slot has a view.
    """
    groups, places = np.shape(batch.text)[:2]
    group = np.arange(len(filled)) * groups // len(filled)
    image = group[:, None] * places + np.asarray(batch.owner)
    return len(np.unique(image[filled]))


def _lengths(segment_ids: np.ndarray, slots: int) -> np.ndarray:
    """Tokens in each slot: segment ids `[b, n]` -> `[b, s]`."""
    rows = len(segment_ids)
    places = segment_ids + (slots + 1) * np.arange(rows)[:, None]
    counts = np.bincount(places.reshape(-1), minlength=rows * (slots + 1))
    return counts.reshape(rows, slots + 1)[:, 1:]


def _memory() -> Values:
    """GiB on this host's fullest device; empty if a device does not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: round(max(s[key] for s in stats) / 2**30, 3)
        for name, key in names.items()
        if all(key in s for s in stats)
    }


def _logged(line: str, until: int) -> bool:
    try:
        return json.loads(line)["step"] <= until
    except (json.JSONDecodeError, KeyError):  # cut short when the run was killed
        return False
