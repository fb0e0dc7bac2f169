"""A config's training step or image tower, lowered for devices that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit.batch import Batch, PackedImages
from navit.config import Config, DataConfig
from navit.kernels.splash import block_size
from navit.kernels.splash_blocks import LANES, WHOLE_ROW, visited
from navit.model import flops
from navit.model.two_tower import TwoTower
from navit.plan.batches import BatchPlans
from navit.plan.rows import Rows
from navit.sharding import Rules, make_mesh
from navit.sources.synthetic import photographs
from navit.train.checks import check_devices, check_parameters
from navit.train.optim import make_optimizer
from navit.train.state import TrainState, init_state
from navit.train.step import make_train_step

# Enough rows to estimate how much attention skips.
_SOME_ROWS = 500


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile, and what it processes.

    Attributes:
      counts: real images, tokens and captions in one global batch, planned from
        simulated photographs.
      flops: the model's operations on these, by part.
      rows, row_tokens: size of the global batch.
      visited: blocks of queries in a row, and blocks of keys that each visits on
        average, if attention skips blocks (`navit.kernels.splash`); None otherwise.
      parameters, optimizer, batch: bytes on one device.
    """

    lowered: Any
    counts: flops.Counts
    flops: flops.Flops
    rows: int
    row_tokens: int
    visited: tuple[int, float] | None
    devices: int
    device_kind: str
    parameters: int
    optimizer: int
    batch: int


def train_program(config: Config, devices: list[Any]) -> Program:
    """The step of `navit train`, as it would run on `devices`.

    Raises:
      ValueError: if the config does not fit the devices.
    """
    mesh, rules = _mesh(config, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        check_devices(config, rules)
        rows, slots, captions = _planned(config)
        groups = config.data.rows // (config.data.caption_rows or 1)
        optimizer = make_optimizer(config.optim, config.train.steps)
        state: TrainState = _place(
            mesh, jax.eval_shape(lambda: init_state(config, optimizer, rules))
        )
        images = _images(config, mesh, rules, config.data.rows, slots)
        place = jax.NamedSharding(mesh, rules("batch") or jax.P())

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)

        text = config.model.text
        b = config.data.rows
        batch = Batch(
            images=images,
            text=integers(groups, captions, text.length if text else 1),
            owner=integers(b, slots),
            label=integers(b, slots),
            id=None,
            size=integers(b, slots, 2),
        )
        step = make_train_step(config, optimizer, rules)
        lowered = _lowered(step, devices, state, batch)
    counts = _counts(config, rows)
    return Program(
        lowered=lowered,
        counts=counts,
        flops=flops.train_step(config, counts),
        rows=config.data.rows,
        row_tokens=config.data.row_tokens,
        visited=_visited(config, rows),
        devices=mesh.size,
        device_kind=devices[0].device_kind,
        parameters=_bytes(state.model),
        optimizer=_bytes((state.opt_state, state.ema)),
        batch=_bytes(batch),
    )


def eval_program(config: Config, devices: list[Any], budget: int) -> Program:
    """The image tower at one token budget, with one image per row, as in evaluation.

    Every device takes `eval.batch_tokens` tokens, by default 16,384.
    """
    mesh, rules = _mesh(config, devices)
    on_each = max(1, (config.eval.batch_tokens or 16_384) // budget)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        check_parameters(config, rules)
        data = DataConfig(
            budgets=(budget,),
            row_tokens=budget,
            rows=on_each * rules.size("batch"),
            slots=1,
            max_upscale=config.data.max_upscale,
        )
        config = dataclasses.replace(config, data=data)
        rows, slots, _ = _planned(config)
        model: TwoTower = _place(
            mesh,
            jax.eval_shape(lambda: TwoTower(config.model, rules, rngs=nnx.Rngs(0))),
        )
        images = _images(config, mesh, rules, data.rows, slots)

        def embed(vision: Any, images: PackedImages) -> Any:
            return vision(images, max_image_tokens=budget).pooled

        lowered = _lowered(jax.jit(embed), devices, model.vision, images)
    counts = _counts(config, rows)._replace(captions=0, pairs=0)
    return Program(
        lowered=lowered,
        counts=counts,
        flops=flops.forward(config.model, counts),
        rows=data.rows,
        row_tokens=budget,
        visited=_visited(config, rows),
        devices=mesh.size,
        device_kind=devices[0].device_kind,
        parameters=_bytes(model.vision),
        optimizer=0,
        batch=_bytes(images),
    )


def _lowered(function: Any, devices: list[Any], *args: Any) -> Any:
    # Without a GPU, jax does not know that "gpu", a device's platform, means CUDA.
    platforms = ("cuda",) if devices[0].platform == "gpu" else None
    return function.trace(*args).lower(lowering_platforms=platforms)


def _mesh(config: Config, devices: list[Any]) -> tuple[Any, Rules]:
    mesh, rules = make_mesh(config.mesh, devices)
    assert mesh is not None
    if mesh.size != len(devices):
        raise ValueError(
            f"the config's mesh has {mesh.size} devices, but the slice {len(devices)}: "
            "set mesh.data or mesh.fsdp to -1, or name a smaller slice"
        )
    return mesh, rules


def _planned(config: Config) -> tuple[Rows, int, int]:
    """A global batch of simulated photographs, slots per row, and captions per group.

    Planned from more images than one batch needs; otherwise, some rows would be closed
    before they are full.
    """
    patch_size, data = config.model.vision.patch_size, config.data
    sample = photographs(20_000)
    plans = BatchPlans(sample, data, patch_size=patch_size, steps=1)
    rows = plans[0]
    if plans.steps_per_epoch == 1:  # the batch may be larger than the sample
        mean = max(1.0, rows.images / max(1, int((np.diff(rows.offsets) > 0).sum())))
        sample = photographs(math.ceil(data.rows * mean * 1.5) + 1000)
        plans = BatchPlans(sample, data, patch_size=patch_size, steps=1)
        rows = plans[0]
    return rows, plans.slots, plans.captions


def visited_blocks(rows: Rows, row_tokens: int) -> float:
    """The mean number of key blocks that a block of queries visits (`splash_skip`)."""
    some = rows.slice(0, min(len(rows), _SOME_ROWS))
    ids = np.zeros((len(some), row_tokens), np.int32)
    for r, (start, stop) in enumerate(itertools.pairwise(some.offsets.tolist())):
        lengths = some.lengths[start:stop]
        ids[r, : lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    size = block_size(row_tokens)
    bounds = np.asarray(visited(jnp.asarray(ids), queries=size, keys=size))
    return float((bounds[..., 1] - bounds[..., 0]).mean())


def _visited(config: Config, rows: Rows) -> tuple[int, float] | None:
    n = config.data.row_tokens
    skips = n > WHOLE_ROW or config.model.attention == "splash_skip"
    if not skips or n % LANES or n == block_size(n):
        return None
    return n // block_size(n), visited_blocks(rows, n)


def _counts(config: Config, rows: Rows) -> flops.Counts:
    lengths = rows.lengths.astype(np.int64)
    count = len(lengths)
    text = config.train.needs("text_tower")
    return flops.Counts(
        tokens=int(lengths.sum()),
        squares=int((lengths**2).sum()),
        images=count,
        captions=rows.images if text else 0,
        pairs=rows.images**2 if text else 0,
        window_squares=flops.window_squares(config.model, rows.grids),
    )


def _images(config: Config, mesh: Any, rules: Rules, b: int, s: int) -> PackedImages:
    n, p = config.data.row_tokens, config.model.vision.patch_size
    place = jax.NamedSharding(mesh, rules("batch") or jax.P())
    shapes = ((b, n, p * p * 3), (b, n), (b, n, 2), (b, s, 2))
    dtypes = (jnp.uint8, jnp.int32, jnp.int32, jnp.int32)
    arrays = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return PackedImages(*arrays)


def _place(mesh: Any, tree: Any) -> Any:
    """Moves shapes from `jax.eval_shape` from the abstract mesh to the real one."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def _bytes(tree: Any) -> int:
    """The bytes of a sharded tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
