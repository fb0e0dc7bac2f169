"""The arguments of the `navit` command, one function a command."""

from __future__ import annotations

import argparse
from typing import Any

from navit import __version__
from navit.compare import arguments
from navit.options import (
    add_config,
    add_hosts,
    add_overrides,
    add_raw,
    add_shares,
    hosts_of,
    integers,
    local,
    workdir,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser; its default `commands` are the names of the commands."""
    parser = argparse.ArgumentParser(
        prog="navit",
        description="Train and run NaViT / NaFlex vision encoders in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  navit train configs/quickstart.py\n"
        "  navit train configs/photos.py data.train.path=~/photos optim.lr=3e-4\n"
        "  navit train configs/photos.py 'data.train=tars:~/x/{00000..00010}.tar' "
        "data.eval=none\n"
        "  navit eval runs/quickstart --budgets 64,256,1024\n"
        "  navit embed runs/quickstart photos/ --max-tokens 729 --out z.npz",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    parser.add_argument("--version", action="version", version=f"navit {__version__}")
    parser.set_defaults(failed=1)
    parsers = parser.add_subparsers(required=True, metavar="command")
    for add in (
        _train,
        _evaluate,
        _embed,
        _index,
        _reshard,
        _convert,
        _compile,
        _check,
        _plan,
        arguments.add,
        _bench,
    ):
        add(parsers)
    for each in parsers.choices.values():
        each.set_defaults(parser=each)
    parser.set_defaults(commands=[*parsers.choices])
    return parser


def _train(parsers: Any) -> None:
    train = parsers.add_parser(
        "train",
        help="train a config, then evaluate it over token budgets",
        description="Trains CONFIG and evaluates the result at eval.budgets. Run the "
        "same\ncommand again to resume after an interruption.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="several hosts: run the same command on each, with a --workdir and data "
        "that all\nof them share.\n" + hosts_of("navit train CONFIG"),
    )
    add_config(
        train,
        "optim.lr=3e-4, data.budgets=64,256, or data.train=KIND:PATH where KIND is "
        "folder, tars, tfds, array_record, parquet or synthetic "
        "(--print-config lists all fields; navit/config/experiment.py explains them)",
    )
    train.add_argument(
        "--print-config",
        action="store_true",
        help="print the config with its overrides, and exit",
    )
    train.add_argument(
        "--workdir",
        type=workdir,
        help="where to write: a folder, or a URL such as gs://BUCKET/RUN (default: "
        "runs/NAME_OF_CONFIG)",
    )
    train.add_argument(
        "--fail-on-sigterm",
        action="store_true",
        help="after SIGTERM, save and exit with 143 instead of 0, for launchers that "
        "restart only what failed (docs/launching.md)",
    )
    add_hosts(train)
    train.set_defaults(run="train")


def _evaluate(parsers: Any) -> None:
    evaluate = parsers.add_parser(
        "eval",
        help="evaluate a checkpoint at any token budgets",
        description="Evaluates the latest checkpoint of a work directory with the "
        "config saved in it, or\nreleased weights with data that you name. Prints a "
        "table, and adds it to\nbudgets.json, .md, .csv and .png.\n\nWithout "
        "eval.tasks, it measures zero-shot accuracy on each classification of\n"
        "data.eval, and retrieval. eval.tasks=KIND,NAME:KIND measures what you list; "
        "KIND is\n  zero_shot       class names in prompts, compared to images\n"
        "  retrieval       recall between images and captions\n"
        "  classification  class logits of a model that was trained to classify\n"
        "  knn, logistic   probes of frozen vectors, which learn from train_source\n"
        "and eval.tasks.NAME.FIELD=VALUE sets source, task, classes, prompts, "
        "train_source,\nmax_images, k, c or per_class of one "
        "(navit/config/evaluation.py).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  navit eval runs/quickstart --budgets 64,256,729,1024\n"
        "  navit eval runs/photos data.eval=folder:~/pets --classes pets.txt \\\n"
        "      --prompts data/prompts/photos.txt\n"
        "  navit eval siglip2-base-patch16-naflex --out results \\\n"
        "      data.eval=tars:~/coco/val.tar eval.tasks=retrieval\n"
        "  navit eval runs/photos eval.tasks=pets:knn,retrieval \\\n"
        "      eval.tasks.pets.source=folder:~/pets eval.tasks.pets.source.split=eval "
        "\\\n"
        "      eval.tasks.pets.train_source=folder:~/pets "
        "eval.tasks.pets.train_source.split=train\n\n"
        "several hosts: run the same command on each, with weights and data that all "
        "of\nthem share; the first writes.\n" + hosts_of("navit eval runs/photos"),
    )
    evaluate.add_argument(
        "weights",
        type=workdir,
        metavar="WORKDIR_OR_WEIGHTS",
        help="a work directory, a Hugging Face directory or a big_vision .npz",
    )
    evaluate.add_argument(
        "--budgets", type=integers, help="token budgets, such as 256,729,1024"
    )
    evaluate.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this one of eval.tasks (repeatable), or without them, retrieval "
        "or a classification of data.eval: coarse, fine or finest for the drawn "
        "dataset, label for a table with that column",
    )
    evaluate.add_argument(
        "--prompts",
        metavar="FILE",
        help="zero-shot templates, one a line with {} for the class name; or a .json "
        "(FILE.json#KEY)",
    )
    evaluate.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, in the order of the labels (words: alphabetical); "
        "a file as for --prompts",
    )
    evaluate.add_argument(
        "--no-cache",
        action="store_true",
        help="keep no vectors; otherwise WORKDIR/embeddings (for released weights "
        "and a WORKDIR behind a URL ~/.cache/navit/embeddings) keeps them, and nothing "
        "is embedded twice",
    )
    evaluate.add_argument(
        "--out",
        type=local,
        help="folder to write to (default: the work directory; required for released "
        "weights)",
    )
    add_overrides(
        evaluate,
        "fields of the saved config to change, such as data.eval.path=~/other or "
        "model.attention=xla; with released weights also all of model.*, such as "
        "model.vision.image_size=384",
    )
    add_hosts(evaluate)
    add_raw(evaluate)
    evaluate.set_defaults(run="evaluate")


def _embed(parsers: Any) -> None:
    embed = parsers.add_parser(
        "embed",
        help="embed image files, folders, tables and tars",
        description="Embeds images of any sizes into OUT, an .npz with `names` and\n"
        "`embeddings` (float32, unit norm), in the order given. IMAGE is an image\n"
        "file; a folder, for all images in and below it, sorted; a .csv, .jsonl or\n"
        ".parquet table, for the files it names; a .tar or a pattern of tars, such as\n"
        "'x/{000..010}.tar', whose images are named TAR: KEY; or - for names from\n"
        "standard input, one per line.\n\nWith --tokens or --merged, OUT has `names`, "
        "and for the image names[i] an array\n`i`, float32 [rows, columns, width] "
        "(`i/k` for each view k, if a strategy makes\nseveral). It is written while "
        "images are read, and numpy reads one array at a time.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  navit embed runs/photos ~/photos --out z.npz\n"
        "  navit embed Qwen2.5-VL-7B-Instruct ~/photos --merged --out tokens.npz\n"
        "  find ~/photos -name '*.jpg' | navit embed runs/photos - --out z.npz",
    )
    embed.add_argument(
        "weights",
        type=workdir,
        metavar="WEIGHTS",
        help="a work directory, a Hugging Face directory or a big_vision .npz",
    )
    embed.add_argument("images", nargs="+", metavar="IMAGE")
    embed.add_argument(
        "--max-tokens",
        type=int,
        help="token budget of an image (default: 256, or the model's own strategy)",
    )
    embed.add_argument(
        "--strategy",
        metavar="NAME[:FIELD=VALUE,...]",
        help="embed the views that this strategy makes of an image, in place of a "
        "budget, such as internvl:max_tiles=6 (docs/strategies.md); a vector is the "
        "mean of an image's views",
    )
    wanted = embed.add_mutually_exclusive_group()
    wanted.add_argument(
        "--tokens",
        action="store_true",
        help="write the tokens of each image, not one vector",
    )
    wanted.add_argument(
        "--merged",
        action="store_true",
        help="write the tokens that the tower's language model gets, after its merger "
        "(docs/weights.md)",
    )
    embed.add_argument(
        "--out",
        type=local,
        required=True,
        help="the .npz to write; the suffix is added if it is not there",
    )
    embed.add_argument(
        "--cache",
        metavar="DIR",
        help="keep images that are read behind URLs in this folder, as data.cache does",
    )
    embed.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out and name files that cannot be read, instead of stopping",
    )
    embed.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key.path=value",
        help="a field of the config (repeatable), such as model.vision.image_size=384",
    )
    add_raw(embed)
    embed.set_defaults(run="embed")


def _index(parsers: Any) -> None:
    index = parsers.add_parser(
        "index",
        help="read and store the sizes of a config's images",
        description="Reads the header of every image of data.train and data.eval, "
        "stores the sizes beside the data (or in ~/.cache/navit), and prints a "
        "summary. Training does this too; an interrupted pass resumes. Several "
        "processes, on one host or many, can share the work.",
    )
    add_config(index, "data.train.path=~/photos")
    index.add_argument(
        "--again",
        action="store_true",
        help="read every header again, even if its size is stored",
    )
    add_shares(index)
    index.set_defaults(run="index")


def _reshard(parsers: Any) -> None:
    reshard = parsers.add_parser(
        "reshard",
        help="write any images as tar shards, which training reads at random",
        description="Reads SOURCE once and writes plain WebDataset tar shards to OUT, "
        "with their\nsizes index. Training needs random access, and compressed tars and"
        "\nTFRecord have none. SOURCE is KIND:PATH, and KIND is\n"
        "  tars          .tar, .tar.gz or .tgz: samples keep their keys and all members"
        "\n  tfrecord      tf.train.Example with the encoded image in a feature\n"
        "  tfds          a prepared dataset, by its name; no TensorFlow is needed\n"
        "  folder, array_record, parquet   as in data.train\n"
        "The bytes of images do not change. Run the same command again to resume, with "
        "the\nfinished shards left as they are. What is damaged or unreadable is left "
        "out, named\nand counted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  navit reshard 'tars:~/cc12m/*.tar.gz' ~/cc12m-shards\n"
        "  navit reshard 'tfrecord:gs://bucket/set/*.tfrecord*' gs://bucket/shards \\\n"
        "      image=jpg caption=text\n"
        "  navit reshard tfds:imagenet2012 ~/imagenet-shards split=train\n"
        "  navit reshard folder:~/photos ~/photo-shards --images 500\n\n"
        "several processes, on one host or many, share the work:\n"
        "  navit reshard SOURCE OUT --processes 2 --process 0\n"
        "  navit reshard SOURCE OUT --processes 2 --process 1",
    )
    reshard.add_argument("source", metavar="SOURCE", help="KIND:PATH")
    reshard.add_argument(
        "out", type=workdir, metavar="OUT", help="a new folder, or a URL of one"
    )
    reshard.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="field=value",
        help="fields of the source, such as caption=text, label=class, split=train or "
        "data_dir=DIR (navit/config/sources.py explains them)",
    )
    reshard.add_argument(
        "--images",
        type=int,
        default=2000,
        help="most images in a shard (default: 2000)",
    )
    reshard.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for copies of files behind a URL that can only be read on this "
        "machine: ArrayRecord, and what describes a TFDS dataset",
    )
    add_shares(reshard)
    reshard.set_defaults(run="reshard")


def _convert(parsers: Any) -> None:
    convert = parsers.add_parser(
        "convert",
        help="convert weights between Hugging Face, big_vision and navit",
        description="Writes the model at IN, in any format that navit reads, to OUT. "
        "No bit of a float32 weight changes.",
    )
    convert.add_argument("path", type=workdir, metavar="IN")
    convert.add_argument("out", type=local, metavar="OUT")
    convert.add_argument(
        "--format",
        choices=(
            "huggingface",
            "big_vision",
            "navit",
            "moonvit",
            "qwen_vl",
            "ovis",
            "pixtral",
            "timm",
        ),
        help="format of OUT (default: big_vision for an .npz, otherwise that of the "
        "release that the image tower was read from)",
    )
    add_overrides(
        convert,
        "settings that IN does not record, such as model.vision.image_size=384 or "
        "model.text.tokenizer=gemma.model",
    )
    add_raw(convert)
    convert.set_defaults(run="convert")


def _compile(parsers: Any) -> None:
    compile_ = parsers.add_parser(
        "compile",
        help="compile the training step for TPUs or GPUs, without any",
        description="Compiles CONFIG's training step (or its image tower) with the "
        "TPU compiler, for a\nslice that need not exist. Shows whether it fits in "
        "memory, how long a step and its\nparts take by the compiler's own schedule, "
        "and what the devices send one another.\nExit code 1: it does not fit; 2: it "
        "could not be determined. Takes minutes and\nabout 3 GB of memory; needs pip "
        "install 'jax[tpu]'. For GPUs (pip install\n'jax[cuda12]') there are no times.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  navit compile configs/siglip2_b16_naflex.py --topology "
        "v5e:4x4 \\\n      data.rows=1024 mesh.fsdp=16 mesh.data=1",
    )
    add_config(compile_, "data.rows=1024")
    compile_.add_argument(
        "--topology",
        required=True,
        help="v5e:4x4, v6e:16x16, v5p:4x4x4, tpu7x:2x2x1, ...; mesh.slices=2 means two "
        "of them; or GPUs of a node: t4:1, l4:1, a100-40:1, a100-80:8, h100:8, h200:8",
    )
    compile_.add_argument(
        "--evaluate",
        action="store_true",
        help="compile the image tower's forward pass instead, at each of eval.budgets",
    )
    compile_.add_argument(
        "--quick",
        action="store_true",
        help="only check whether it fits, in a fraction of the time",
    )
    compile_.add_argument(
        "--json", type=local, help="also write the results to this file"
    )
    compile_.set_defaults(run="compile_", failed=2)


def _check(parsers: Any) -> None:
    check = parsers.add_parser(
        "check",
        help="check this machine: devices, kernels, decoding, checkpoints",
        description="Checks whether this machine runs CONFIG, or the default "
        "config: its\ndevices, decoding, a checkpoint's round trip, and each kernel "
        "against the plain path.\nNothing is trained, and no data of the config is "
        "read. On a CPU this takes a minute\nfor the quickstart's sizes, and a few "
        "minutes for B/16's. Exit code 1: something\nfails (docs/pods.md).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="columns:\n"
        "  values, gradients  the largest difference from the plain path in float32,\n"
        "                     as a share of the largest value\n"
        "  at most            the share that rounding explains\n"
        "  ms, plain ms       one call with gradients, and the same of the plain path\n"
        "  verdict            ok; differs; does not compile; not checked, with the "
        "reason\n\nexamples:\n"
        "  navit check configs/quickstart.py\n"
        "  navit check configs/siglip2_b16_naflex.py --workdir /mnt/runs\n"
        "  navit check model.dtype=bfloat16 data.row_tokens=512",
    )
    check.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a python file: configs/*.py (default: the sizes of B/16)",
    )
    add_overrides(check, "any field of the config, such as model.dtype=bfloat16")
    check.add_argument(
        "--workdir",
        type=local,
        help="where the checkpoint is tried (default: the temporary folder); nothing "
        "stays there",
    )
    check.add_argument("--json", type=local, help="also write the results to this file")
    check.set_defaults(run="check")


def _plan(parsers: Any) -> None:
    plan = parsers.add_parser(
        "plan",
        help="show how images would pack into rows of several lengths",
        description="Reads the sizes of CONFIG's images, plans an epoch in rows of "
        "several\nlengths, and prints padding, images per row, slots filled, the share "
        "of the text\ntower's work that is captions, and steps per epoch (* marks the "
        "config's own row\nlength). No pixels are read.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  navit plan configs/photos.py data.train.path=~/photos "
        "--rows 1024,4096 --out plan.png",
    )
    add_config(plan, "data.budgets=64,256")
    plan.add_argument(
        "--rows",
        type=integers,
        default=(1024, 2048, 4096, 8192),
        help="row lengths in tokens (default: 1024,2048,4096,8192)",
    )
    plan.add_argument("--out", type=local, help="write a plot to this .png")
    plan.set_defaults(run="plan")


def _bench(parsers: Any) -> None:
    bench = parsers.add_parser(
        "bench",
        help="measure the input pipeline of a config",
        description="Measures only the input pipeline of CONFIG, stage by stage.\n"
        "Other measurements: python -m "
        "navit.bench.{plan,attention_speed,embedding,evaluation,convert} --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  navit bench input configs/photos.py "
        "data.train.path=~/photos data.workers=4",
    )
    bench.add_argument("what", choices=("input",))
    add_config(bench, "data.budgets=64,256")
    bench.add_argument(
        "--batches", type=int, default=20, help="batches to measure (default: 20)"
    )
    bench.set_defaults(run="bench")
