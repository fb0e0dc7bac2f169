"""Checks kernels on the device at hand against the plain path that they replace.

`navit check` checks all of them. Training checks those that its config uses, and takes
the plain path in place of a kernel that fails.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from navit.config import Config, Sigmoid
from navit.kernels.fused import block_tokens
from navit.kernels.splash_blocks import LANES
from navit.model.attention import choice
from navit.model.layers import compute_dtype
from navit.model.text import captions_beside
from navit.sharding import Rules, platform, use_mesh
from navit.train import hosts
from navit.train.comparison import Case, Verdict, judged
from navit.train.kernel_cases import (
    KERNELS,
    attention_case,
    fused_cases,
    interpreted,
    loss_case,
)

log = logging.getLogger("navit")

# The most rows that a check takes to get training's blocks of tokens.
_ROWS = 8


def verdicts(
    config: Config,
    mesh: jax.sharding.Mesh | None,
    rules: Rules,
    *,
    only_used: bool = False,
) -> Iterator[Verdict]:
    """Compares each implementation with the plain path, for the sizes of a config.

    Attention and layers run on one device of every process, and losses on the mesh.

    Args:
      only_used: only the kernels that training with this config uses here.
    """
    with use_mesh(mesh):
        devices, tensor = rules.size("batch"), rules.size("tensor")
    for case in _layer_cases(
        config, rules, devices=devices, tensor=tensor, only_used=only_used
    ):
        yield from judged(case)
    with use_mesh(mesh):
        if loss := loss_case(config, rules, only_used=only_used):
            yield from judged(loss)


def proven(config: Config, mesh: jax.sharding.Mesh | None, rules: Rules) -> Config:
    """The config with the plain path in place of each kernel that fails here.

    Checks the kernels that the config uses, and only on accelerators. A kernel that
    fails on one host is replaced on all of them.
    """
    if not config.train.check_kernels or platform() == "cpu":
        return config
    start = time.perf_counter()
    checked = list(verdicts(config, mesh, rules, only_used=True))
    own = {x.name: f"{x.verdict} ({x.why})" for x in checked if x.failed}
    failed: dict[str, str] = {}
    for text in hosts.gather_texts(json.dumps(own)):
        failed |= json.loads(text)
    if checked and not failed:
        names = ", ".join(x.name for x in checked)
        seconds = time.perf_counter() - start
        log.info("%s equal the plain path here (%.1f s)", names, seconds)
    return _without(config, failed)


def _without(config: Config, failed: dict[str, str]) -> Config:
    """Replaces the kernels that failed, with a warning for each.

    Args:
      failed: name -> what is wrong.
    """
    model, train = config.model, config.train
    for name, wrong in failed.items():
        if " attention " in name:
            model = dataclasses.replace(model, attention="xla")
            instead = "model.attention=xla: attention takes several times as long"
        elif name.startswith("loss "):
            plain: Any = "dense" if "loss gather" in failed else "gather"
            losses = tuple(
                dataclasses.replace(x, implementation=plain)
                if isinstance(x, Sigmoid)
                else x
                for x in train.losses
            )
            train = dataclasses.replace(train, losses=losses)
            instead = f"train.losses.sigmoid.implementation={plain}: more memory"
        else:
            model = dataclasses.replace(model, fused=False)
            instead = "model.fused=false: MLPs take about 1.6 times as long"
        if hosts.first():
            log.warning(
                "%s %s. This run uses %s. `navit check` shows more; "
                "train.check_kernels=false keeps the kernel",
                name,
                wrong,
                instead,
            )
    return dataclasses.replace(config, model=model, train=train)


def _layer_cases(
    config: Config, rules: Rules, *, devices: int, tensor: int, only_used: bool
) -> Iterator[Case]:
    """Attention, and the layers around it, of both towers, on one device.

    Args:
      devices, tensor: the numbers of devices that rows and heads are split over.
      only_used: only the kernels that training with this config uses here.
    """
    vision, text, n = config.model.vision, config.model.text, config.data.row_tokens
    most = min(config.data.most_tokens(vision.patch_size), n)
    # Three images and padding; no padding if two images fill a row; and no image.
    lengths = [
        [min(n // 2, most), min(n // 4, most), min(n // 16, most)],
        [most, min(n - most, most)],
        [],
    ]
    rows = _rows(config, devices)
    lengths += [lengths[1]] * (rows - len(lengths))
    ids = np.stack([_row(x, n) for x in lengths])
    names = ["xla", "unpack", *KERNELS]
    if only_used:
        names = [config.model.attention]
        if names == ["auto"]:
            names = [choice(platform(), n, vision.width // tensor, False)]
    make = functools.partial(attention_case, config, tensor=tensor)
    if names != ["xla"]:
        yield make("vision", vision, ids, names, longest=most)
    fused = functools.partial(fused_cases, config, rules, only_used=only_used)
    yield from fused("vision", vision, ids)
    if text is None:
        return
    beside = 0
    if config.model.attention != "xla":
        beside = captions_beside(LANES, text.length)
    if beside:
        ids = np.tile(np.repeat(np.arange(1, beside + 1), text.length), (3, 1))
        name = choice(platform(), ids.shape[1], text.width // tensor, False)
        if name != "xla":
            yield make("text", text, ids, [name], longest=text.length)
    else:  # one caption in a row, in rows that fill blocks of 128 tokens
        rows = 2 * LANES // math.gcd(text.length, LANES)
        ids = np.ones((rows, text.length), np.int32)
    yield from fused("text", text, ids)


def _rows(config: Config, devices: int) -> int:
    """The fewest rows whose tokens divide into blocks as those of training do.

    Interpreted, blocks of any size will do.
    """
    vision, n = config.model.vision, config.data.row_tokens
    rows = config.data.rows // devices // config.train.microbatches

    def block(rows: int) -> int:
        shape = (rows, n, vision.width)
        x = jax.ShapeDtypeStruct(shape, compute_dtype(config.model.dtype))
        size = block_tokens(x, vision.mlp_dim, ())
        return min(size, 1) if interpreted() else size

    return next((r for r in range(3, _ROWS + 1) if block(r) == block(rows)), 3)


def _row(lengths: list[int], tokens: int) -> Int[np.ndarray, " n"]:
    """Segment ids of images of these lengths, one after another, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, tokens - len(ids)))
