"""The device mesh, and the rules that map names of array axes to mesh axes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils

from navit.config import MeshConfig

# CUDA compute capability of the first GPUs with bfloat16 matrix units.
AMPERE = 8.0
Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that array axes are split over; all None without a mesh.

    Attributes:
      batch: rows of a batch, and images.
      embed: the width axis of every large parameter (FSDP). The parameter is gathered
        in the compute dtype where it is used; activations stay where they are.
      tensor: heads, and the hidden axis of an MLP (tensor parallelism). Activations
        are summed over it after every attention and every MLP.
      gradients: the dtype in which gradients of parameters are summed over devices.
    """

    batch: Axes = None
    embed: str | None = None
    tensor: Axes = None
    gradients: str = "float32"

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rows of a batch are split over."""
        return (self.batch,) if isinstance(self.batch, str) else tuple(self.batch or ())

    def __call__(self, *names: str | None) -> jax.P | None:
        """`rules("batch", None)` -> a PartitionSpec, or None without a mesh."""
        if self.batch is None:
            return None
        return jax.P(*(name and getattr(self, name) for name in names))

    def size(self, name: str) -> int:
        """The number of devices that an axis is split over."""
        axes = getattr(self, name) or ()
        mesh = jax.sharding.get_abstract_mesh()
        axes = (axes,) if isinstance(axes, str) else axes
        return math.prod(mesh.shape[axis] for axis in axes)

    def rows(self, ndim: int) -> jax.P | None:
        """The PartitionSpec of an array that is split only by rows."""
        return self("batch", *[None] * (ndim - 1))

    def gather(self, p: jax.Array, dtype: Any) -> jax.Array:
        """Gathers a parameter of any shape over `embed`; it stays split over `tensor`.

        The parameter is cast to the compute dtype first, which halves the bytes sent.
        Its gradient is summed over the devices once, in the dtype `gradients`, and
        scattered to the devices that own the parameter's shards.
        """
        if self.batch is None:
            return p.astype(dtype)
        return _whole(self, jax.typeof(p).sharding.spec, dtype, p)

    def replicate(self, x: jax.Array) -> jax.Array:
        """Replicates an activation of any shape: communication, made explicit."""
        return x if self.batch is None else jax.reshard(x, jax.P())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(rules: Rules, spec: jax.P, dtype: Any, p: jax.Array) -> jax.Array:
    del spec
    p = p.astype(dtype)
    axes = [None if x == rules.embed else x for x in jax.typeof(p).sharding.spec]
    # `reduced`: each device keeps its own gradient of the result, and
    # `_whole_backward` sums them once.
    return jax.reshard(p, jax.P(*axes, reduced=set(rules.batch_axes)))


def _whole_forward(
    rules: Rules, spec: jax.P, dtype: Any, p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _whole(rules, spec, dtype, p), jnp.zeros((), p.dtype)


def _whole_backward(
    rules: Rules, spec: jax.P, dtype: Any, like: Any, gradient: jax.Array
) -> tuple[jax.Array]:
    del dtype
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in rules.batch_axes if mesh.shape[axis] > 1]

    # Explicit, because for a reshard XLA sums whole gradients and then slices them.
    def summed(g: jax.Array) -> jax.Array:
        g, left = g.astype(rules.gradients), list(axes)
        for dim, axis in enumerate(spec):
            if axis == rules.embed and axis in left:
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=dim, tiled=True)
                left.remove(axis)
        return jax.lax.psum(g, left) if left else g

    # check_vma=False: otherwise JAX rejects `unreduced` inputs that differ by device.
    mapped: Any = jax.shard_map(
        summed,
        in_specs=jax.typeof(gradient).sharding.spec,
        out_specs=spec,
        check_vma=False,
    )
    return (mapped(gradient).astype(like.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None
) -> tuple[jax.sharding.Mesh | None, Rules]:
    """The mesh and its rules; (None, Rules()) for a single device of this machine.

    Slices are laid along `data`, so that only gradients cross the data-centre network.

    Args:
      devices: the devices to use; None means all.

    Raises:
      ValueError: if the axes do not fit the devices.
    """
    single = devices is None
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), config.slices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and known > 0 and count % known == 0:
            sizes[axis] = count // known
    used = math.prod(sizes.values())
    all_used = used == count or (jax.process_count() == 1 and used < count)
    if min(sizes.values()) < 1 or not all_used or sizes["data"] % slices:
        given = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in sizes)
        raise ValueError(
            f"{given} do not fit {count} devices: their product must be {count} (one "
            "of them may be -1, for the rest), and data must be divisible by "
            f"mesh.slices={slices}"
        )
    if used == 1 and single:
        return None, Rules()
    if sizes["tensor"] == 1:
        del sizes["tensor"]
    shape = tuple(sizes.values())
    # `allow_split_physical_axes`: fsdp=8 and tensor=2 share a side of a 4x4 slice.
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        outer = (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices[:used], allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices[:used], allow_split_physical_axes=True
        )
    explicit = (jax.sharding.AxisType.Explicit,) * len(shape)
    mesh = jax.sharding.Mesh(grid, tuple(sizes), axis_types=explicit)
    if used == 1:
        return mesh, Rules()
    return mesh, Rules(
        ("data", "fsdp"),
        embed="fsdp" if sizes["fsdp"] > 1 else None,
        tensor="tensor" if "tensor" in sizes else None,
        gradients=config.gradients,
    )


def use_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh`, or a context that does nothing without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """Where the program being traced will run: "cpu", "gpu" or "tpu".

    The mesh in use decides. Its devices need not be on this machine: this is how a
    program for a TPU is compiled on a CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> float | None:
    """CUDA compute capability of this process's GPU; None without one."""
    found = getattr(jax.local_devices()[0], "compute_capability", None)
    return float(found) if found and re.fullmatch(r"\d+\.\d+", found) else None


def multiplies_bfloat16() -> bool:
    """Whether the program being traced will run where XLA multiplies bfloat16.

    The attention of `jax.nn` multiplies bfloat16 with float32 sums. XLA refuses this on
    GPUs older than Ampere ("Unsupported algorithm ... ALG_DOT_BF16_BF16_F32").
    """
    capability = compute_capability() if platform() == "gpu" else None
    return capability is None or capability >= AMPERE


def place_of(x: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The sharding, on the mesh in use, of an array from `jax.eval_shape`."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    spec = x.sharding.spec if x.sharding is not None else jax.P()
    return jax.NamedSharding(mesh, spec)


def split_rows(batch: Any, rules: Rules) -> Any:
    """Builds global arrays, split over devices by rows, from this host's rows.

    Without a mesh, moves them to the default device.
    """
    spec = rules("batch")
    if spec is None:
        return jax.device_put(batch)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
