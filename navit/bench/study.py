"""Trains and evaluates the configs of a study over seeds, at equal compute.

  python -m navit.bench.study configs/studies/token_drop.py --plot

Each run is a work directory of `navit train`, in OUT/runs. Finished runs are skipped,
so the same command goes on after a kill. At the end it writes OUT/results.json and
results.md, and with --plot results.png: means over the seeds with standard errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import navit
from navit import config as config_lib
from navit import stopping
from navit.bench import study_report
from navit.config import AnySource, Config, Study
from navit.files import write_atomic
from navit.input import pipeline
from navit.model import flops
from navit.plan.batches import BatchPlans
from navit.sources.kinds import Opener
from navit.sources.local_cache import open_cache
from navit.sources.source import Source
from navit.train import loop
from navit.train.checkpoint import quiet_orbax
from navit.train.interruption import Outcome
from navit.train.metrics import clock

# More steps than any run of a study takes.
_MOST_STEPS = 10**6


class Spent(NamedTuple):
    """What a number of training steps takes: real images and tokens, model FLOPs."""

    steps: int
    images: int
    tokens: int
    flops: int


class Run(NamedTuple):
    """One training run."""

    name: str
    target: float  # FLOPs
    seed: int
    config: Config
    spent: Spent

    @property
    def folder(self) -> str:
        name = re.sub(r"[^\w.]+", "_", self.name)
        return f"{name}-{self.target:.3g}-seed{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="a file with get_study() -> Study")
    parser.add_argument("--out", type=Path, help="default: runs/studies/NAME")
    parser.add_argument("--seeds", help="such as 0,1,2; default: the study's")
    parser.add_argument("--plot", action="store_true", help="write results.png too")
    args = parser.parse_args(arguments)
    study = config_lib.run_file(args.study, "get_study", Study)
    if args.seeds:
        seeds = tuple(int(seed) for seed in args.seeds.split(","))
        study = dataclasses.replace(study, seeds=seeds)
    out = args.out or Path("runs/studies") / args.study.stem
    quiet_orbax()
    if jax.config.jax_compilation_cache_dir is None:
        # Runs that differ only in their seed have the same program.
        folder = str((out / "compiled").absolute())
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    results = run(study, out, report=functools.partial(print, flush=True))
    if isinstance(results, Outcome):
        print(f"{results.value}: the same command goes on in {out}")
        return stopping.EXIT_CODE if results is Outcome.INTERRUPTED else 0
    lines = study_report.summarize(results)
    both = json.dumps(
        {"summary": [line._asdict() for line in lines], "runs": results}, indent=1
    )
    write_atomic(out / "results.json", f"{both}\n".encode())
    table = study_report.markdown(study, lines)
    write_atomic(out / "results.md", table.encode())
    if args.plot:
        write_atomic(out / "results.png", study_report.plot(study, lines))
    print(table)
    return 0


def run(
    study: Study, out: Path, *, report: Callable[[str], Any]
) -> list[dict[str, Any]] | Outcome:
    """Trains and evaluates what is not finished in `out`.

    Returns one dictionary a run: what it spent, its seconds, and its rows of
    `budgets.json`; after an interruption, how the run ended.

    Raises:
      ValueError: if a finished run of `out` had another config.
    """
    runs = list(planned(study))
    results = [_finished(each, out) for each in runs]
    pairs = zip(runs, results, strict=True)
    left = sum(each.spent.flops for each, result in pairs if result is None)
    done, seconds = 0, 0.0
    for i, each in enumerate(runs):
        title = f"run {i + 1} of {len(runs)}: {each.folder}"
        if results[i] is not None:
            report(f"{title} is finished")
            continue
        eta = f", ETA {clock(seconds / done * (left - done))}" if done else ""
        report(f"{title}, {each.spent.steps} steps{eta}")
        start = time.perf_counter()
        outcome = loop.train(each.config, out / "runs" / each.folder)
        if not outcome:
            return outcome
        took = time.perf_counter() - start
        results[i] = _finish(each, out, took)
        done, seconds = done + each.spent.flops, seconds + took
    return [result for result in results if result is not None]


def planned(study: Study) -> Iterator[Run]:
    """The runs of a study, seed by seed, with the steps that their FLOPs buy."""
    opened: dict[AnySource, Source] = {}
    for seed, target in itertools.product(study.seeds, study.flops):
        for name, config in study.configs.items():
            source = config.data.train
            if source not in opened:
                opened[source] = Opener(cache=open_cache(config.data)).open(source)
            data = dataclasses.replace(config.data, seed=seed)
            config = dataclasses.replace(config, data=data)
            spent = steps_for(config, opened[source], target)
            train = dataclasses.replace(config.train, seed=seed, steps=spent.steps)
            config = dataclasses.replace(config, train=train)
            yield Run(name, target, seed, config, spent)


def steps_for(config: Config, source: Source, target: float) -> Spent:
    """The least number of training steps that take `target` model FLOPs or more.

    Counts the planned batches, so nothing is read or trained.
    """
    plans = BatchPlans(
        source.sizes,
        config.data,
        patch_size=config.model.vision.patch_size,
        steps=_MOST_STEPS,
        parts=pipeline.parts_of(source, config.data),
    )
    spent = Spent(0, 0, 0, 0)
    while spent.flops < target:
        rows = plans[spent.steps]
        lengths = rows.lengths
        images, tokens = len(lengths), int(lengths.sum())
        counts = flops.Counts(
            tokens,
            int((lengths**2).sum()),
            images,
            window_squares=flops.window_squares(config.model, rows.grids),
        )
        if config.train.needs("text_tower"):
            counts = counts._replace(captions=images, pairs=images**2)
        cost = flops.train_step(config, counts).total
        spent = Spent(
            spent.steps + 1,
            spent.images + images,
            spent.tokens + tokens,
            spent.flops + cost,
        )
    return spent


def _finished(each: Run, out: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = out / "runs" / each.folder / "finished.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    config = config_lib.to_json(each.config)
    if result["config"] != json.loads(json.dumps(config)):
        raise ValueError(
            f"{path.parent} was trained with another config: name another --out, or "
            "delete it"
        )
    return result


def _finish(each: Run, out: Path, seconds: float) -> dict[str, Any]:
    workdir = out / "runs" / each.folder
    rows = json.loads((workdir / "budgets.json").read_text())["rows"]
    result = {
        "name": each.name,
        "target_flops": each.target,
        "seed": each.seed,
        **each.spent._asdict(),
        "seconds": round(seconds, 1),
        "navit": navit.__version__,
        "rows": [row for row in rows if row["step"] == each.spent.steps],
        "config": config_lib.to_json(each.config),
    }
    write_atomic(workdir / "finished.json", f"{json.dumps(result)}\n".encode())
    return result


if __name__ == "__main__":
    sys.exit(main())
