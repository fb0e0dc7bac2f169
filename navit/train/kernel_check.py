"""Checks kernels on the device at hand against the plain path that they replace.

`navit check` checks all of them. Training checks those that its config uses, and takes
the plain path in place of a kernel that fails.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int

from navit.config import Config, override
from navit.kernels.fused import block_tokens
from navit.kernels.splash_blocks import LANES
from navit.model.attention import KERNELS, choice
from navit.model.layers import compute_dtype
from navit.model.text import captions_beside
from navit.sharding import Rules, platform, use_mesh
from navit.train import hosts
from navit.train.comparison import OK, SKIPPED, Case, Verdict, verdicts
from navit.train.kernel_cases import (
    attention_case,
    fused_cases,
    loss_case,
    simulation,
)
from navit.train.turn_case import turn_case

log = logging.getLogger("navit")

# The most rows that a check takes to get training's blocks of tokens.
_ROWS = 8
# The setting that replaces each kind of kernel, and its cost.
_REPLACEMENTS = {
    "attention": ("model.attention=xla", "attention takes several times as long"),
    "fused_mlp": ("model.fused=false", "MLPs take longer"),
    "norm_project": ("model.fused=false", "MLPs take longer"),
    "turn": ("model.fused=false", "rotary positions take longer"),
    "ring": ("train.losses.sigmoid.implementation=gather", "more memory"),
    "gather": ("train.losses.sigmoid.implementation=dense", "more memory"),
}


def kernel_verdicts(
    config: Config,
    mesh: jax.sharding.Mesh | None,
    rules: Rules,
    *,
    only_used: bool = False,
) -> Iterator[Verdict]:
    """Compares each implementation with the plain path, for the sizes of a config.

    Attention and layers run on one device of every process, and losses on the mesh.

    Args:
      only_used: only the kernels that training with this config uses here, untimed.
    """
    with use_mesh(mesh):
        devices, tensor = rules.size("batch"), rules.size("tensor")
    for case in _layer_cases(
        config, rules, devices=devices, tensor=tensor, only_used=only_used
    ):
        yield from verdicts(case, timed=not only_used)
    with use_mesh(mesh):
        loss = loss_case(config, rules, only_used=only_used)
        of_loss = verdicts(loss, timed=not only_used) if loss else []
    yield from of_loss


def replace_failed(
    config: Config, mesh: jax.sharding.Mesh | None, rules: Rules
) -> Config:
    """The config with the plain path in place of each kernel that fails here.

    Checks the kernels that the config uses, and only on accelerators. A kernel that
    fails on one host is replaced on all of them.
    """
    if not config.train.check_kernels or platform() == "cpu":
        return config
    checked = list(kernel_verdicts(config, mesh, rules, only_used=True))
    if names := [x.name for x in checked if x.outcome == OK]:
        log.info("%s agree with the plain path within rounding", ", ".join(names))
    for x in checked:
        if x.outcome == SKIPPED:
            log.warning("%s is used, but not checked: %s", x.name, x.why)
    own = {x.name: f"{x.outcome} ({x.why})" for x in checked if x.failed}
    failed: dict[str, str] = {}
    for text in hosts.gather_texts(json.dumps(own)):
        failed |= json.loads(text)
    settings = []
    for name, wrong in failed.items():
        # A ring is replaced by "gather", unless that fails too.
        kind = "gather" if "loss gather" in failed else "ring"
        kind = kind if name == "loss ring" else name.split()[1]
        setting, cost = _REPLACEMENTS[kind]
        settings.append(setting)
        again = f" Evaluate with {setting} too." if "model." in setting else ""
        if hosts.first():
            log.warning(
                "%s %s. This run uses %s: %s.%s `navit check` shows more; "
                "train.check_kernels=false keeps the kernel",
                name,
                wrong,
                setting,
                cost,
                again,
            )
    return override(config, settings)


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
    ids = _segment_ids(config, devices, most)
    names = ["xla", "unpack", "blocks", *KERNELS]
    if only_used:
        names = [config.model.attention]
        if names == ["auto"]:
            names = [choice(platform(), n, vision.width // tensor)]
    make = functools.partial(attention_case, config, tensor=tensor)
    if names != ["xla"]:
        yield make("vision", vision, ids, names, longest=most)
    fused = functools.partial(fused_cases, config, rules, only_used=only_used)
    yield from fused("vision", vision, ids)
    turned = turn_case(config, ids, tensor=tensor, only_used=only_used)
    if turned is not None:
        yield turned
    if text is None:
        return
    beside = 0
    if config.model.attention != "xla":
        beside = captions_beside(LANES, text.length)
    if beside:
        ids = np.tile(np.repeat(np.arange(1, beside + 1), text.length), (3, 1))
        name = choice(platform(), ids.shape[1], text.width // tensor)
        if name != "xla":
            yield make("text", text, ids, [name], longest=text.length)
    else:  # one caption in a row, in rows that fill blocks of 128 tokens
        rows = 2 * LANES // math.gcd(text.length, LANES)
        ids = np.ones((rows, text.length), np.int32)
    yield from fused("text", text, ids)


def _segment_ids(config: Config, devices: int, most: int) -> Int[np.ndarray, "b n"]:
    """Three images and padding; no padding if two images fill a row; and no image.

    Full rows follow until the tokens divide into blocks as those of training do;
    interpreted, blocks of any size will do.

    Args:
      most: tokens of the largest image.
    """
    vision, n = config.model.vision, config.data.row_tokens

    def block(rows: int) -> int:
        shape = (rows, n, vision.width)
        x = jax.ShapeDtypeStruct(shape, compute_dtype(config.model.dtype))
        size = block_tokens(x, vision.mlp_dim, ())
        return min(size, 1) if simulation() else size

    training = block(config.data.rows // devices // config.train.microbatches)
    rows = next((r for r in range(3, _ROWS + 1) if block(r) == training), 3)
    mixed = [min(n // 2, most), min(n // 4, most), min(n // 16, most)]
    full = [most, min(n - most, most)]
    ids = np.zeros((rows, n), np.int32)
    for row, lengths in zip(ids, [mixed, full, [], *[full] * (rows - 3)], strict=True):
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(segments)] = segments
    return ids
