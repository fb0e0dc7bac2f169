"""The device mesh, and the rules from names of array axes to mesh axes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from navit.config import MeshConfig

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes an array axis is split over; all None means no mesh at all.

    Attributes:
      batch: rows of a batch, and images.
      embed: the width axis of every large parameter (FSDP). It is gathered, in the
        compute dtype, where the parameter is used; activations never move for it.
      tensor: heads, and the hidden axis of an MLP (tensor parallelism). Activations
        are summed over it after every attention and every MLP.
    """

    batch: Axes = None
    embed: Axes = None
    tensor: Axes = None

    def __call__(self, *names: str | None) -> jax.P | None:
        """`rules("batch", None)` -> a PartitionSpec, or None where there is no mesh."""
        if self == Rules():
            return None
        return jax.P(*(name and getattr(self, name) for name in names))

    def gather(self, params: Any, dtype: Any) -> Any:
        """Undoes `embed` on a tree of parameters; what `tensor` splits stays split.

        Matrices are cast to the compute dtype first, so that half the bytes travel.
        """

        def whole(p: jax.Array) -> jax.Array:
            p = p.astype(dtype) if p.ndim > 1 else p
            if self.embed is None:
                return p
            spec = jax.typeof(p).sharding.spec
            kept = (None if axis == self.embed else axis for axis in spec)
            return jax.reshard(p, jax.P(*kept))

        return jax.tree.map(whole, params)

    def replicate(self, x: jax.Array) -> jax.Array:
        """Gathers an activation from all devices: communication, said out loud."""
        return x if self == Rules() else jax.reshard(x, jax.P())


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None
) -> tuple[jax.sharding.Mesh | None, Rules]:
    """The mesh and its rules; (None, no rules) for a single device of this machine.

    Several slices lie along `data`, so that what crosses the data-centre network is the
    gradients alone.

    Args:
      devices: those to use; None takes all that there are.

    Raises:
      ValueError: if the axes do not fit the devices.
    """
    single = devices is None
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), config.slices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and known > 0:
            sizes[axis] = count // known
    used = math.prod(sizes.values())
    all_used = used == count or (jax.process_count() == 1 and used < count)
    if min(sizes.values()) < 1 or not all_used or sizes["data"] % slices:
        given = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in sizes)
        raise ValueError(
            f"{given} do not fit {count} devices: they must multiply to that, one of "
            f"them may be -1, and data must be divisible by mesh.slices={slices}"
        )
    if used == 1 and single:
        return None, Rules()
    shape = tuple(sizes.values())
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices[:used], allow_split_physical_axes=True
        )
        explicit = (jax.sharding.AxisType.Explicit,) * 3
        mesh = jax.sharding.Mesh(grid, tuple(sizes), axis_types=explicit)
    else:
        mesh = jax.make_mesh(shape, tuple(sizes), devices=devices[:used])
    return mesh, Rules(
        ("data", "fsdp"),
        embed="fsdp" if sizes["fsdp"] > 1 else None,
        tensor="tensor" if sizes["tensor"] > 1 else None,
    )


def use_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh`, or nothing where there is none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place_of(x: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Where on the mesh in use an array from `jax.eval_shape` belongs."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    spec = x.sharding.spec if x.sharding is not None else jax.P()
    return jax.NamedSharding(mesh, spec)


def split_rows(batch: Any, rules: Rules) -> Any:
    """This host's rows of each array -> global arrays, split over the devices by rows.

    To the default device where there is no mesh.
    """
    spec = rules("batch")
    if spec is None:
        return jax.device_put(batch)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
