"""The arguments of `navit views` and `navit budget`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from navit.options import local

_STRATEGIES = """strategies:
  square, anyres, template, internvl, deepseek_vl2, deepseek_ocr, llava_uhd, minicpm_v,
  ureader, llava_mini, qwen, kimi, naflex (docs/strategies.md). A strategy has the
  published settings; internvl:max_tiles=6,thumbnail=false,qwen sets two of the first.
  anyres:canvases=3x3 means all canvases of up to 3x3 tiles.
"""


def add(parsers: Any) -> None:
    """Adds both commands."""
    views = parsers.add_parser(
        "views",
        help="compare how resolution strategies cut and scale images",
        description="Prints what each strategy makes of each image. IMAGE is a size,\n"
        "WIDTHxHEIGHT in pixels, or what navit embed takes: a file, a folder, a table\n"
        "or a tar. Only sizes are read, unless a picture is drawn.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="columns:\n"
        "  encoder tokens  patches of all views\n"
        "  tokens out      what the language model gets, separators included\n"
        "  TFLOPs          of an encoder of the size --model, each view on its own\n"
        "  scale           encoder pixels per image pixel, where there are fewer\n"
        "  kept            share of the image's pixels that remain\n"
        "  distortion      stretch of the width against the height\n"
        "  padding         share of the encoder's pixels that are filler\n"
        "  thumbnail       share of the encoder's pixels in thumbnails\n"
        "  cut             chance that an object of --object, anywhere in the image, "
        "is cut\n\n" + _STRATEGIES + "\nexamples:\n"
        "  navit views 600x1500 1792x896 --strategy internvl,qwen,anyres\n"
        "  navit views data/sample/cat.jpg --strategy internvl:max_tiles=6,naflex "
        "--out views.png",
    )
    views.add_argument("images", nargs="+", metavar="IMAGE")
    views.add_argument(
        "--strategy",
        metavar="NAME[:FIELD=VALUE,...],...",
        help="strategies to compare (default: all, as published)",
    )
    views.add_argument(
        "--object",
        type=_size,
        default=(64, 64),
        metavar="WIDTHxHEIGHT",
        help="the object that may be cut, in pixels of the image (default: 64x64)",
    )
    views.add_argument("--out", type=local, help="draw the views into this .png")
    _add_encoder(views)
    views.set_defaults(run="views")

    budget = parsers.add_parser(
        "budget",
        help="choose a resolution strategy for each kind of request",
        description="Chooses a strategy for each kind of request of a workload, within "
        "a budget of the\nlanguage model's tokens. It begins with the cheapest "
        "candidate of each kind that will\ndo, and takes the upgrade of most detail "
        "per extra token until none fits. Detail is\nthe sum over requests of the "
        "scale at which their images are seen, at most 1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="WORKLOAD is a folder of images, each subfolder a kind, or a .csv or "
        ".json table:\n"
        "  kind    requests of a kind take the same strategy\n"
        "  size    WIDTHxHEIGHT in pixels; or image, a file beside the table\n"
        "  count   how many such requests there are (default: 1)\n"
        "  scale   the least scale that the text of the image needs (default: 0)\n"
        "  images  images of a request (default: 1)\n"
        "  frames  frames of a video (default: 1); each costs what an image costs\n"
        "  limit   the most tokens of a request (default: none)\n\n"
        + _STRATEGIES
        + "  A name without fields stands for a range of its settings.\n\nexamples:\n"
        "  navit budget data/workloads/example.csv --tokens 4M\n"
        "  navit budget ~/photos --tokens 500k --strategy qwen,naflex --out budget.png",
    )
    budget.add_argument("workload", type=local, metavar="WORKLOAD")
    budget.add_argument(
        "--tokens",
        type=_count,
        required=True,
        metavar="N",
        help="tokens for the whole workload, such as 2500000, 500k or 4M",
    )
    budget.add_argument(
        "--strategy",
        metavar="NAME[:FIELD=VALUE,...],...",
        help="candidates (default: a range of settings of all but llava_mini)",
    )
    budget.add_argument("--out", type=local, help="write a plot to this .png")
    _add_encoder(budget)
    budget.set_defaults(run="budget")


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patch", type=_positive, help="side of a patch (default: as published)"
    )
    parser.add_argument(
        "--model",
        default="L",
        metavar="SIZE",
        help="the encoder whose operations are counted: Ti, S, B, L, So400m or g "
        "(default: L)",
    )


def size_in(text: str) -> tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT, such as 600x1500; None for another text."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        return None
    width, height = int(match[1]), int(match[2])
    if not width or not height:
        raise ValueError(f"{text} (width x height) has no pixels")
    return height, width


def _size(text: str) -> tuple[int, int]:
    try:
        size = size_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size is None:
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT in pixels, such as 64x64, not {text!r}"
        )
    return size


def _count(text: str) -> int:
    """A number such as 2500000, 500k, 1.5M or 2G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
    value = int(float(match[1]) * units[match[2]]) if match else 0
    if not value:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens, such as 2500000, 500k or 4M, not {text!r}"
        )
    return value


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number above 0, not {text!r}"
        )
    return int(text)
