"""The arguments of `navit views` and `navit budget`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Local = Callable[[str], Path]

_STRATEGIES = """strategies:
  square, anyres, template, internvl, deepseek_vl2, deepseek_ocr, llava_uhd, minicpm_v,
  ureader, llava_mini, qwen, kimi, naflex (docs/strategies.md). A strategy has the
  published settings; internvl:max_tiles=6,thumbnail=false,qwen sets two of the first.
  anyres:canvases=3x3 means all canvases of up to 3x3 tiles.
"""


def add(parsers: Any, local: Local) -> None:
    """Adds both commands. `local` reads the path of a local file."""
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


def _size(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT in pixels, such as 64x64, not {text!r}"
        )
    return int(match[2]), int(match[1])


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number above 0, not {text!r}"
        )
    return int(text)
