"""Small configs and packed batches that several test files share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit.batch import PackedImages
from navit.config import (
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PositionConfig,
    Synthetic,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from navit.evals.metric import Metric
from navit.model.vision import Vision
from navit.sources import examples
from navit.sources.images import standard
from navit.sources.source import Source

PATCH = 4


def read_image(source: Source, index: int):
    """An image of a source, read whole: the file's bytes or `[height, width, 3]`."""
    return standard(source.record(index).image)


def serialize_example(features: dict[str, Any]) -> bytes:
    """A `tf.train.Example`; each feature is bytes, text, integers or floats.

    A feature is one value or a list of them. Text is encoded as UTF-8.
    """
    example = examples.example_message()()
    for name, value in features.items():
        values = value if isinstance(value, list | tuple) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
        feature = example.features.feature[name]
        if values:
            getattr(feature, kind[type(values[0])]).value.extend(values)
    return example.SerializeToString(deterministic=True)


def values(metrics: Iterable[Metric]) -> dict[str, float]:
    """What was measured, by name."""
    return {metric.name: metric.value for metric in metrics}


def chances(metrics: Iterable[Metric]) -> dict[str, float]:
    """What guessing gives, by name, where that is known."""
    return {m.name: m.chance for m in metrics if m.chance is not None}


def vision_config(**overrides) -> VisionConfig:
    defaults = dict(patch_size=PATCH, width=24, depth=2, mlp_dim=40, num_heads=3)
    return VisionConfig(**{**defaults, **overrides})


def make_vision(model: ModelConfig | None = None, seed: int = 0, **overrides) -> Vision:
    """A small image tower with no zero parameters, including norms and biases."""
    config = model or ModelConfig(vision=vision_config(**overrides), text=None)
    shapes = jax.eval_shape(lambda: Vision(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf) -> jax.Array:
        name = jax.tree_util.keystr(path)
        std = (2 / sum(leaf.shape[-2:])) ** 0.5 if "kernel" in name else 0.1
        values = std * rng.standard_normal(leaf.shape) + ("scale" in name)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def pack_grids(rows, row_tokens, slots, patches) -> PackedImages:
    """Lays out images by hand.

    `rows` has one {slot: (image, grid)} per row; `patches` maps an image to its
    `[tokens, p*p*3]` pixels.
    """
    width = PATCH**2 * 3
    out = PackedImages(
        np.zeros((len(rows), row_tokens, width), np.uint8),
        np.zeros((len(rows), row_tokens), np.int32),
        np.zeros((len(rows), row_tokens, 2), np.int32),
        np.zeros((len(rows), slots, 2), np.int32),
    )
    for b, row in enumerate(rows):
        start = 0
        for slot, (image, grid) in row.items():
            stop = start + grid[0] * grid[1]
            out.patches[b, start:stop] = patches[image]
            out.segment_ids[b, start:stop] = slot + 1
            out.coords[b, start:stop] = np.indices(grid).reshape(2, -1).T
            out.grids[b, slot] = grid
            start = stop
    out.check()
    return out


def random_patches(rng: np.random.Generator, grids) -> list[np.ndarray]:
    return [
        rng.integers(0, 256, (h * w, PATCH**2 * 3)).astype(np.uint8) for h, w in grids
    ]


def tiny_config(**train) -> Config:
    """A whole experiment that trains in seconds on one device."""
    return Config(
        model=ModelConfig(
            vision=vision_config(patch_size=16, width=16, mlp_dim=24, num_heads=2),
            text=TextConfig(length=24, width=16, depth=1, mlp_dim=24, num_heads=2),
        ),
        data=DataConfig(
            train=Synthetic(size=60),
            eval=Synthetic(size=12, seed=1),
            budgets=(9, 16),
            row_tokens=40,
            rows=4,
            slots=4,
        ),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(
            **{"steps": 6, "log_every": 2, "checkpoint_every": 3, **train}
        ),
        eval=EvalConfig(budgets=(16, 25)),
        mesh=MeshConfig(data=1, fsdp=1),
    )


_FACTORIZED = [
    PositionConfig(
        kind="factorized",
        size=16,
        coordinates=coordinates,
        encoding=encoding,
        combine=combine,
    )
    for coordinates in ("absolute", "fractional", "fractional_aspect")
    for encoding in ("learned", "sinusoidal", "fourier")
    for combine in ("sum", "product", "stack")
]
POSITIONS = [
    PositionConfig(),
    PositionConfig(kind="learned_1d", size=64),
    PositionConfig(kind="learned_2d", size=16),
    *_FACTORIZED,
]
