"""The batches to embed: how many rows at a time, and whether they fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from navit.config import Config
from navit.input import memory
from navit.input.fill import Filled, fill_rows
from navit.plan import epoch
from navit.plan.rows import Rows, pack_rows
from navit.sharding import platform
from navit.sources.source import Record

# Batches that are made ahead of the one that is embedded.
_AHEAD = 4


def grids_of(config: Config, sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """The grid at which each image is embedded: pixels `[m, 2]` -> patches `[m, 2]`."""
    vision = config.model.vision
    if vision.fixed_grid:
        return np.full((len(sizes), 2), vision.position.size)
    return epoch.grids_of(sizes, max_tokens, config.data, vision.patch_size)


def budget_of(config: Config, max_tokens: int) -> int:
    """The token budget: that of a model of one resolution is its own.

    Raises:
      ValueError: if such a model takes more than `max_tokens`.
    """
    vision = config.model.vision
    side = vision.position.size
    if not vision.fixed_grid:
        return max_tokens
    if max_tokens < side * side:
        raise ValueError(
            f"this model was trained at one size, {side}x{side} patches: pass "
            f"max_tokens={side * side}, or load it with model.vision."
            "fixed_grid=false to keep the aspect at any budget"
        )
    return side * side


def batches(
    config: Config,
    read: Callable[[int], Record],
    sizes: np.ndarray,
    max_tokens: int,
) -> Iterator[tuple[Rows, Filled]]:
    """Packs images and yields all planned rows of each batch, with them filled.

    Each process of the mesh fills its own share of the rows.

    Args:
      read: index -> record, from several threads.
      sizes: `[m, 2]` (height, width) of each image.
      max_tokens: the budget of an image, and the length of a row.

    Raises:
      ValueError: if a grid extends beyond the model's position table, or the budget
        needs more memory than is free.
    """
    slots, grids = slots_of(config), grids_of(config, sizes, max_tokens)
    config.model.vision.position.check(grids)
    check_budget(config, max_tokens, len(grids))
    rows = pack_rows(grids, max_tokens, slots)
    size = config.model.vision.image_size
    yield from filled_batches(config, read, rows, max_tokens, slots, image_size=size)


def filled_batches(
    config: Config,
    read: Callable[[int], Record],
    rows: Rows,
    max_tokens: int,
    slots: int,
    *,
    image_size: int | None = None,
    resample: Literal["bilinear", "bicubic"] = "bilinear",
) -> Iterator[tuple[Rows, Filled]]:
    """Yields all planned rows of each batch, with this process's share of them filled.

    Args:
      read, max_tokens: as in `batches`.
      slots: of a row.
      image_size, resample: as in `fill_rows`.
    """
    at_once = rows_at_once(config, max_tokens, len(rows))
    parts = [rows.slice(i, i + at_once) for i in range(0, len(rows), at_once)]
    processes = processes_of_mesh()
    share = at_once // processes
    first = share * jax.process_index() if processes > 1 else 0
    own = [part.slice(first, first + share) for part in parts]
    filled = functools.partial(
        fill_rows,
        read=read,
        patch_size=config.model.vision.patch_size,
        row_tokens=max_tokens,
        slots=slots,
        image_size=image_size,
        resample=resample,
        dct=config.data.dct,
    )
    yield from zip(parts, _made_ahead(filled, own), strict=True)


def check_budget(config: Config, max_tokens: int, images: int = 1) -> None:
    """Refuses a token budget that takes more memory than this host has free.

    Counts the pixels of the batches that are held at a time. On a CPU, where attention
    works in the same memory, also the logits of one row and head. Embedding takes more.

    Args:
      images: the least number of images to embed.

    Raises:
      ValueError: if the budget needs more memory than is free.
    """
    rows = -(-images // slots_of(config))
    at_once = rows_at_once(config, max_tokens, rows)
    share = at_once // processes_of_mesh()
    batches = min(-(-rows // at_once), _AHEAD + 1)
    needed = batches * share * max_tokens * config.model.vision.patch_size**2 * 3
    if platform() == "cpu":
        needed += 4 * max_tokens**2  # float32
    memory.check(
        needed,
        f"embedding {share} x {max_tokens} tokens at a time (rows x token budget)",
        "lower the budget"
        + (f" or eval.batch_tokens={config.eval.batch_tokens}" if share > 1 else ""),
    )


def rows_at_once(config: Config, row_tokens: int, rows: int) -> int:
    """How many of `rows` to embed at a time: a power of two on each device."""
    tokens = config.eval.batch_tokens
    if tokens is None:
        tokens = 2048 if jax.default_backend() == "cpu" else 16384
    at_once = max(1, tokens // row_tokens)
    return shared_by_devices(min(2 ** (at_once.bit_length() - 1), rows))


def shared_by_devices(count: int) -> int:
    """`count` rounded up to a power of two, then to a multiple of the devices.

    This compiles few shapes, and gives all devices equal shares.
    """
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else mesh.size
    return -(-(2 ** (count - 1).bit_length()) // devices) * devices


def processes_of_mesh() -> int:
    """How many processes the mesh in use spans."""
    mesh = jax.sharding.get_mesh()
    # jax raises an AttributeError when an empty mesh is asked.
    return jax.process_count() if not mesh.empty and mesh.is_multi_process else 1


def slots_of(config: Config) -> int:
    """How many images a row may hold: one if each is enlarged to its budget, else 8."""
    return 1 if config.data.max_upscale is None else 8


def _made_ahead(
    filled: Callable[[Rows], Filled], parts: Sequence[Rows]
) -> Iterator[Filled]:
    """Yields the batch of each part in order, and makes the next ones meanwhile."""
    if len(parts) == 1:
        return iter([filled(parts[0])])
    import grain  # slow to import

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_AHEAD)
    batches = grain.MapDataset.source(parts).map(filled)
    return iter(batches.to_iter_dataset(options))
