"""The parts of a training loss: frozen dataclasses.

A run minimises the sum of `weight` times each part of `train.losses`. On a command
line, the `short` name of a class chooses it: `train.losses=sigmoid,classification:0.5`.
A new part is a class here, a function in `navit/losses/`, and its case in
`navit/losses/parts.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# What a part may need of the model ("text_tower", "classifier") and of the data.
Need = Literal["text_tower", "captions", "classifier"]


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """SigLIP's loss: every image against every caption, each pair independently.

    `implementation`: how it sums over all pairs (`navit.losses.contrastive`); all give
    the same value.
    """

    short = "sigmoid"
    needs = ("text_tower", "captions")
    weight: float = 1.0
    implementation: Literal["auto", "dense", "gather", "ring"] = "auto"


@dataclasses.dataclass(frozen=True)
class Softmax:
    """CLIP's loss: the right caption for each image, and the right image for each."""

    short = "softmax"
    needs = ("text_tower", "captions")
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross-entropy of the image tower's class logits."""

    short = "classification"
    needs = ("classifier",)
    weight: float = 1.0


Loss = Sigmoid | Softmax | Classification
