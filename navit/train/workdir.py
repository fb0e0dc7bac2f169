"""The checkpoints of a work directory, by their names; nothing here reads them."""

from __future__ import annotations

from pathlib import Path

FOLDER = "checkpoints"


def is_workdir(path: Path) -> bool:
    return (path / FOLDER).is_dir()


def steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in `WORKDIR/checkpoints`, in order."""
    names = (path.name for path in folder.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def outdated(saved: list[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to delete: all but the last `keep` and multiples of `keep_every`."""
    return [x for x in saved[:-keep] if keep_every is None or x % keep_every]


def set_aside(workdir: Path, step: int) -> Path:
    """Moves a checkpoint to WORKDIR/damaged; returns where it is now."""
    aside, copies = workdir / "damaged" / str(step), 0
    while aside.exists():
        copies += 1
        aside = aside.with_name(f"{step}.{copies}")
    aside.parent.mkdir(exist_ok=True)
    return (workdir / FOLDER / str(step)).rename(aside)
