"""The commands of `navit/cli.py`. Each takes its arguments and returns its exit code.

Imports are inside the commands, so that mistakes in a config are reported at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from navit import config as config_lib
from navit.config.model import ROUNDING
from navit.config.towers import starting_from


def _config(args: argparse.Namespace) -> config_lib.Config:
    """The config of a command, with the towers that a training run of it has."""
    config = config_lib.load(args.config, args.overrides)
    if config.init_towers and config.init is not None:
        config, _ = _from_weights(config, args.overrides)
    return config


def _from_weights(
    config: config_lib.Config, overrides: Sequence[str]
) -> tuple[config_lib.Config, Callable[..., Any]]:
    """The config with the towers of `config.init`, and what makes the model."""
    from navit.convert.stored import build
    from navit.weights import read

    assert config.init is not None
    weights = read(config.init)
    config = starting_from(
        config, weights.model, where=weights.where, overrides=overrides
    )
    return config, functools.partial(build, weights, seed=config.train.seed)


def train(args: argparse.Namespace) -> int:
    config = config_lib.load(args.config, args.overrides)
    if args.print_config:
        print(json.dumps(config_lib.to_json(config), indent=2))
        return 0
    from navit import stopping
    from navit.train import hosts, loop, remote_workdir
    from navit.train.checkpoint import quiet_orbax
    from navit.train.interruption import Outcome
    from navit.train.start import trained_model
    from navit.train.workdir import is_workdir

    if not args.debug:
        quiet_orbax()
    initial = None
    place = args.workdir or Path("runs") / Path(args.config).stem
    # The towers that `init_towers` asks for are read later.
    known = None if config.init_towers else config
    with (
        hosts.joined(args.coordinator, args.processes, args.process, debug=args.debug),
        remote_workdir.training(place, known) as (workdir, sender),
    ):
        if config.init is not None:
            # If there is a run to resume, all processes restore it together.
            hosts.check_same_config(config)
            hosts.check_same(f"whether {workdir} holds a run", f"{is_workdir(workdir)}")
            trained = trained_model(workdir, sender)
            if trained is None:
                config, initial = _from_weights(config, args.overrides)
            else:  # the run resumes without reading `config.init`
                config = starting_from(
                    config, trained, where=f"{workdir}", overrides=args.overrides
                )
        outcome = loop.train(config, workdir, initial, sender)
        if outcome is Outcome.INTERRUPTED:
            return stopping.EXIT_CODE
        # After a platform's notice, 0: the job did what it was asked to.
        is_failure = outcome is Outcome.PREEMPTED and args.fail_on_sigterm
        return stopping.PREEMPTED if is_failure else 0


def evaluate(args: argparse.Namespace) -> int:
    from navit.train import hosts, remote_workdir

    with (
        hosts.joined(args.coordinator, args.processes, args.process, debug=args.debug),
        remote_workdir.reading(args.weights) as weights,
    ):
        _evaluate(args, weights)
    return 0


def _evaluate(args: argparse.Namespace, weights: Path) -> None:
    from navit.embed import Embedder
    from navit.evals import budgets, vector_cache, vectors
    from navit.evals.tasks import open_tasks
    from navit.sharding import make_mesh, use_mesh
    from navit.sources.bucket import is_url
    from navit.train import hosts
    from navit.train.workdir import is_workdir
    from navit.weights import load, read

    if weights.suffix == ".py":
        raise ValueError(
            f"{weights} is a config: name the work directory of its run, such as "
            f"{Path('runs') / weights.stem}"
        )
    in_workdir = is_workdir(weights)
    cache = vector_cache.default_cache()
    if in_workdir and not is_url(args.weights):
        cache = weights / "embeddings"
    prefixes: tuple[str, ...] = ROUNDING
    if not in_workdir:
        if not args.out and weights.exists():  # before the slow loading
            raise ValueError(
                f"{weights} is not a work directory to write to: name a folder for "
                "the results with --out"
            )
        prefixes = ("model.",)
    model_overrides = [x for x in args.overrides if x.startswith(prefixes)]
    mesh, rules = make_mesh(config_lib.MeshConfig())
    with use_mesh(mesh):
        embedder = load(weights, overrides=model_overrides, rules=rules, raw=args.raw)
        trained = embedder.config
        config = config_lib.override(trained, args.overrides)
        if args.budgets:
            config = _by_budgets(config)
            evaluation = dataclasses.replace(config.eval, budgets=args.budgets)
            config = dataclasses.replace(config, eval=evaluation)
        for difference in config_lib.differences(trained, config):
            if not difference.startswith(("data.", "eval.")):
                raise ValueError(
                    f"{difference}: the checkpoint was trained with the former; an "
                    "evaluation may change only data.*, eval.* and "
                    f"{', '.join(ROUNDING)}"
                )
        if model_overrides and not in_workdir:
            trained = dataclasses.replace(trained, model=read(weights).model)
        hosts.check_same_config(config)
        hosts.check_same(f"the model in {weights}", vectors.fingerprint(embedder))
        budgets.check_memory(config)
        opened = open_tasks(
            config, names=args.task, classes=args.classes, prompts=args.prompts
        )
        if not opened:
            raise ValueError(
                f"{weights} has neither a text tower nor classes, so there is nothing "
                "to measure by itself: add eval.tasks=knn, or another probe"
            )
        hosts.check_same("what is evaluated", budgets.describe(opened))
        budgets.check(config, opened)
        budgets.run(
            Embedder(embedder.model, config, step=embedder.step),
            config,
            opened,
            args.out or weights,
            trained=trained,
            cache=None if args.no_cache else cache,
            name=weights.resolve().name + (" (raw)" if args.raw else ""),
        )


def _by_budgets(config: config_lib.Config) -> config_lib.Config:
    """The config for an evaluation at budgets, also of a model with a strategy."""
    if config.data.strategy is None:
        return config
    budgets = (config.data.row_tokens,)  # training's, which an evaluation never reads
    data = dataclasses.replace(config.data, strategy=None, budgets=budgets)
    return dataclasses.replace(config, data=data)


def embed(args: argparse.Namespace) -> int:
    from navit.compare.candidates import parse_one
    from navit.embed_files import embed_files, embed_tokens
    from navit.input.image_list import images_of
    from navit.sharding import make_mesh, use_mesh
    from navit.sources.local_cache import open_cache
    from navit.weights import load

    # Checked before the slow loading of the model.
    images = images_of(
        args.images,
        sys.stdin,
        must_exist=not args.skip_unreadable,
        cache=open_cache(config_lib.DataConfig(cache=args.cache)),
    )
    if not images:
        raise ValueError("there are no names on standard input")
    out = args.out
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a directory: name a file in it")
    if out.suffix != ".npz":
        out = out.with_name(f"{out.name}.npz")
    mesh, rules = make_mesh(config_lib.MeshConfig())
    with use_mesh(mesh):
        model = load(args.weights, overrides=args.set, rules=rules, raw=args.raw)
        patch = model.config.model.vision.patch_size
        options: dict[str, Any] = dict(
            max_tokens=args.max_tokens,
            strategy=parse_one(args.strategy, patch=patch) if args.strategy else None,
            skip_unreadable=args.skip_unreadable,
        )
        if args.tokens or args.merged:
            count = embed_tokens(model, images, out, merged=args.merged, **options)
            print(f"wrote the tokens of {count} image{'s' * (count != 1)} to {out}")
            return 0
        count = embed_files(model, images, out, **options)
    print(f"wrote {count} embedding{'s' if count > 1 else ''} to {out}")
    return 0


def index(args: argparse.Namespace) -> int:
    from navit.input import pipeline
    from navit.sources import summary
    from navit.sources.index import Share, Unfinished
    from navit.sources.kinds import Opener
    from navit.sources.local_cache import open_cache
    from navit.sources.overlap import singles

    data = config_lib.load(args.config, args.overrides).data
    process, processes = _share(args)
    share = Share(args.again, process, processes, publish=True)
    opener = Opener(share, open_cache(data))
    parts = [functools.partial(opener.open, one) for one in singles(data.train)]
    if isinstance(data.eval, config_lib.Mixture):
        parts += [functools.partial(opener.open, one) for one in singles(data.eval)]
    elif data.eval is not None:
        parts.append(functools.partial(pipeline.open_eval_source, data, opener))
    unfinished = []
    for opened in parts if processes > 1 else ():
        try:
            opened()
        except Unfinished as error:
            unfinished.append(f"{error}")
    if unfinished:
        print("\n".join(dict.fromkeys(unfinished)))
        return 0
    print(summary.describe("data.train", opener.open(data.train)))
    if data.eval is not None:
        source = pipeline.open_eval_source(data, opener)
        print(summary.describe("data.eval", source))
    return 0


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """--process and --processes."""
    processes = 1 if args.processes is None else args.processes
    if (args.process is None) != (args.processes is None) or not (
        0 <= (args.process or 0) < processes
    ):
        raise ValueError(
            f"--process {args.process} of --processes {args.processes}: name both, and "
            "count from 0, as --process 0 --processes 2 and --process 1 --processes 2"
        )
    return args.process or 0, processes


def reshard(args: argparse.Namespace) -> int:
    from navit.config.sources import words
    from navit.reshard import reshard
    from navit.sources.index import Share, Unfinished
    from navit.sources.local_cache import open_cache

    _, colon, path = args.source.partition(":")
    if not colon or path.startswith("//"):  # nothing, or the protocol of a URL
        raise ValueError(
            f"the source {args.source} has no kind: write KIND:PATH, such as "
            f"folder:{args.source} or tars:{args.source}"
        )
    overrides = [f"data.train={args.source}"]
    overrides += [f"data.train.{x}" for x in args.overrides]
    data = config_lib.override(config_lib.Config(), overrides).data
    data = dataclasses.replace(data, cache=args.cache)
    process, processes = _share(args)
    try:
        shards = reshard(
            data.train,
            str(args.out),
            images=args.images,
            share=Share(process=process, processes=processes),
            cache=open_cache(data),
        )
    except Unfinished as error:
        print(error)
        return 0
    named, *fields = words(shards)
    settings = [f"data.train={named}", *(f"data.train.{x}" for x in fields)]
    print(f"to read them: {shlex.join(settings)}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from navit.weights import read, write

    weights = read(args.path, overrides=args.overrides, raw=args.raw)
    format = write(weights, args.out.expanduser(), args.format)
    print(f"wrote {args.out} ({format})")
    return 0


def compile_(args: argparse.Namespace) -> int:
    from navit.compile import run

    config = _config(args)
    return run.run(
        config,
        args.topology,
        evaluate=args.evaluate,
        quick=args.quick,
        out=args.json,
    )


def check(args: argparse.Namespace) -> int:
    if args.config and "=" in args.config:  # no CONFIG, but overrides
        args.overrides, args.config = [args.config, *args.overrides], None
    if args.config:
        config = _config(args)
    else:
        config = config_lib.override(config_lib.Config(), args.overrides)
    from navit import machine
    from navit.train.checkpoint import quiet_orbax

    if not args.debug:
        quiet_orbax()
    return machine.run(config, args.workdir, args.json)


def plan(args: argparse.Namespace) -> int:
    from navit.input import pipeline
    from navit.plan import report as plan_report
    from navit.sources.kinds import Opener
    from navit.sources.local_cache import open_cache

    config = _config(args)
    opener = Opener(cache=open_cache(config.data))
    source = opener.open(config.data.train)
    patch_size = config.model.vision.patch_size
    most = config.data.most_tokens(patch_size)
    rows = [x for x in args.rows if x >= most]
    if short := sorted(set(args.rows) - set(rows)):
        print(
            f"not shown: rows of {', '.join(map(str, short))} tokens, since an image "
            f"may take {most}"
        )
    results = plan_report.report(
        source.sizes,
        config.data,
        patch_size=patch_size,
        row_lengths=rows,
        parts=pipeline.parts_of(source, config.data),
    )
    print(
        f"{len(source)} images, global batch of {config.data.rows} rows of "
        f"{config.data.row_tokens} tokens"
    )
    print(plan_report.table(results, config.data.row_tokens), end="")
    if line := pipeline.left_out(results.left_out, source):
        print(line)
    if args.out:
        plan_report.plot(results, args.out)
        print(f"wrote {args.out}")
    return 0


def views(args: argparse.Namespace) -> int:
    from navit.compare import views_table
    from navit.compare.candidates import parse
    from navit.compare.shown import shown
    from navit.model import variants
    from navit.plan.strategies import BY_NAME

    strategies = parse(args.strategy or ",".join(BY_NAME), patch=args.patch)
    tower = variants.vision(f"{args.model}/14")  # each strategy has its own patch
    images = shown(args.images)
    cells = views_table.compare(
        images, strategies, tower=tower, object_size=args.object
    )
    print(views_table.table(images, cells).rstrip())
    if args.out:
        from navit.compare import views_figure

        views_figure.plot(images, cells, args.out)
        print(f"wrote {args.out}")
    return 0


def budget(args: argparse.Namespace) -> int:
    from navit.compare import budget as choice
    from navit.compare import workload
    from navit.compare.candidates import candidates
    from navit.model import variants

    strategies = candidates(args.strategy, patch=args.patch)
    tower = variants.vision(f"{args.model}/14")  # each strategy has its own patch
    requests = workload.read(args.workload.expanduser())
    result = choice.decide(requests, strategies, args.tokens, tower=tower)
    print(choice.table(result), end="")
    if args.out:
        choice.plot(result, args.out)
        print(f"wrote {args.out}")
    return 0


def bench(args: argparse.Namespace) -> int:
    from navit.bench import input as bench_input

    bench_input.run(_config(args), args.batches)
    return 0
