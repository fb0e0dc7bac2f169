"""The device mesh, and the rules from names of array axes to mesh axes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax

from navit.config import MeshConfig

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes an array axis is split over; all None means no mesh at all.

    Attributes:
      batch: rows of a batch, and images.
      embed: the width axis of every large parameter (FSDP). It is gathered, in the
        compute dtype, where the parameter is used; activations never move for it.
    """

    batch: Axes = None
    embed: Axes = None

    def __call__(self, *names: str | None) -> jax.P | None:
        """`rules("batch", None)` -> a PartitionSpec, or None where there is no mesh."""
        if self == Rules():
            return None
        return jax.P(*(name and getattr(self, name) for name in names))

    def gather(self, params: Any, dtype: Any) -> Any:
        """Undoes `embed` on a tree of parameters: every device gets them whole.

        Matrices are cast to the compute dtype first, so that half the bytes travel.
        """

        def whole(p: jax.Array) -> jax.Array:
            p = p.astype(dtype) if p.ndim > 1 else p
            return p if self.embed is None else jax.reshard(p, jax.P())

        return jax.tree.map(whole, params)

    def replicate(self, x: jax.Array) -> jax.Array:
        """Gathers an activation from all devices: communication, said out loud."""
        return x if self == Rules() else jax.reshard(x, jax.P())


def make_mesh(config: MeshConfig) -> tuple[jax.sharding.Mesh | None, Rules]:
    """The mesh and its rules; (None, no rules) for a single device.

    Raises:
      ValueError: if the axes do not fit the devices.
    """
    count = jax.device_count()
    sizes = {"data": config.data, "fsdp": config.fsdp}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and known > 0:
            sizes[axis] = count // known
    used = math.prod(sizes.values())
    all_used = used == count or (jax.process_count() == 1 and used < count)
    if min(sizes.values()) < 1 or not all_used:
        raise ValueError(
            f"mesh.data={config.data} and mesh.fsdp={config.fsdp} do not fit {count} "
            "devices: the two must multiply to that, and one of them may be -1"
        )
    if used == 1:
        return None, Rules()
    devices = jax.devices()[:used]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    return mesh, Rules(("data", "fsdp"), "fsdp" if sizes["fsdp"] > 1 else None)


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
