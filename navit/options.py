"""Arguments that several commands have, and how their values are read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a python file: configs/*.py")
    add_overrides(parser, f"any field of the config, such as {example}")


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help=help
    )


def add_raw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw",
        action="store_true",
        help="of a run with optim.ema, take the weights that training updates, not "
        "their moving average",
    )


def add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="with several processes: the address that process 0 listens on",
    )
    add_shares(parser, " (1: do not look for others)")


def add_shares(parser: argparse.ArgumentParser, note: str = "") -> None:
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help=f"how many processes there are{note}",
    )
    parser.add_argument(
        "--process", type=int, metavar="I", help="the index of this process, from 0"
    )


def hosts_of(command: str) -> str:
    """How several hosts run a command together."""
    two = f"  {command} --coordinator HOST0:8476 --processes 2 --process"
    return (
        "On a Cloud TPU slice, in GKE, under Slurm or Open MPI they find one another;\n"
        f"elsewhere, on two hosts:\n{two} 0\n{two} 1"
    )


def local(text: str) -> Path:
    if "://" in text:
        # Path would take it for a folder named `gs:`.
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, but this must be a local file or folder: name a local "
            "path (a mounted bucket has one), or copy the files yourself"
        )
    return Path(text)


def workdir(text: str) -> Path | str:
    if match := re.match(r"([a-z][a-z0-9]+):/(?!/)", text):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a URL ({match[1]}:// has two slashes) nor a clear "
            f"path: write ./{text} for a local folder of this name"
        )
    return text if "://" in text else Path(text)


def integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(x) for x in text.split(",") if x)
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(
            f"expected numbers of at least 1, such as 256,729, not {text!r}"
        )
    return values
