"""Published resolution strategies: an image's size -> its views and tokens.

  from navit import strategies

  s = strategies.InternVL(max_tiles=6)
  s.views(height, width)   # what the encoder sees, in its order
  s.tokens(height, width)  # how many tokens the language model gets

Each is a frozen dataclass with the published defaults. All have:

  short                 its name in `by_name` and on the command line
  patch                 side of the encoder's patch in pixels
  resample              the filter of the resize, "bilinear" or "bicubic"
  views(height, width)  `View`s, in the encoder's order
  layout(height, width) what the language model gets, in its order
  tokens(height, width) the number of tokens in the layout

The last three also take `images`, how many images the request has, as some strategies
give each fewer tiles then. They raise ValueError for a size that the strategy refuses.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

from navit.plan.strategies.anyres import AnyRes as AnyRes
from navit.plan.strategies.deepseek import DeepSeekOCR as DeepSeekOCR
from navit.plan.strategies.deepseek import DeepSeekVL2 as DeepSeekVL2
from navit.plan.strategies.internvl import InternVL as InternVL
from navit.plan.strategies.internvl import Template as Template
from navit.plan.strategies.llava_mini import LLaVAMini as LLaVAMini
from navit.plan.strategies.native import Kimi as Kimi
from navit.plan.strategies.native import NaFlex as NaFlex
from navit.plan.strategies.native import Pixtral as Pixtral
from navit.plan.strategies.native import QwenVL as QwenVL
from navit.plan.strategies.square import Square as Square
from navit.plan.strategies.uhd import LLaVAUHD as LLaVAUHD
from navit.plan.strategies.uhd import MiniCPMV as MiniCPMV
from navit.plan.strategies.ureader import UReader as UReader
from navit.plan.strategies.views import Block as Block
from navit.plan.strategies.views import Separator as Separator
from navit.plan.strategies.views import View as View

Strategy = (
    Square
    | AnyRes
    | Template
    | InternVL
    | DeepSeekVL2
    | DeepSeekOCR
    | LLaVAUHD
    | MiniCPMV
    | UReader
    | LLaVAMini
    | QwenVL
    | Kimi
    | Pixtral
    | NaFlex
)

# Those with one view an image, which keep its aspect at any budget: `within` sets it.
NativeStrategy = QwenVL | Kimi | Pixtral | NaFlex

BY_NAME: dict[str, type[Strategy]] = {
    kind.short: kind for kind in typing.get_args(Strategy)
}


def by_name(name: str, **fields: Any) -> Strategy:
    """The strategy of this name, with some fields other than their defaults.

    Raises:
      ValueError: if there is no such strategy or field, with the nearest names.
    """
    if name not in BY_NAME:
        raise ValueError(f"no strategy {name!r}: {_nearest(name, list(BY_NAME))}")
    kind = BY_NAME[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        if field not in known:
            raise ValueError(f"{name} has no {field!r}: {_nearest(field, known)}")
    return kind(**fields)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
