"""TPU slices and GPUs by name: devices to compile for on a machine that has none."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, NamedTuple

from navit.compile import gpus
from navit.libtpu import quiet


class Chip(NamedTuple):
    """One jax device of a chip.

    Attributes:
      memory: GiB that the compiler leaves to a program.
      clock: cycles per second, from the peaks in Google's data sheets; None if unknown.
    """

    memory: float
    clock: float | None


CHIPS = {
    "v5e": Chip(15.75, 1.5e9),
    "v5p": Chip(95.74, 1.75e9),
    "v6e": Chip(31.25, 1.75e9),
    "tpu7x": Chip(94.75, None),
}

_NAME = re.compile(rf"({'|'.join(CHIPS)}):(\d+)x(\d+)(?:x(\d+))?")
_GPU_NAME = re.compile(rf"({'|'.join(gpus.GPUS)}):(\d+)")


def is_gpu(name: str) -> bool:
    """Whether a topology is a node of GPUs, such as "h100:8"."""
    return name.partition(":")[0] in gpus.GPUS


def compute_dtype(name: str) -> Literal["bfloat16", "float32"]:
    """What `model.dtype=auto` is there (`navit.model.layers`)."""
    gpu = gpus.GPUS.get(name.partition(":")[0])
    return "float32" if gpu and gpu.capability < (8, 0) else "bfloat16"


def chip(name: str) -> Chip:
    """The chip of a slice such as "v5e:16x16", or the GPU of a node such as "h100:8".

    GPUs have no clock: their compiler writes no schedule.
    """
    kind = name.partition(":")[0]
    return Chip(gpus.usable_memory(kind), None) if is_gpu(name) else CHIPS[kind]


def prepare(dump: str | None = None) -> None:
    """Sets what libtpu reads when it loads; call this before anything uses a device.

    Args:
      dump: a directory for the kernels' schedules (`navit.compile.kernel_times`).
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet()
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = (
            os.environ.get("LIBTPU_INIT_ARGS", "")
            + f" --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        )


def devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of a slice such as "v5e:16x16", "v5p:4x4x4" or "tpu7x:2x2x1".

    "h100:8" is a node of eight GPUs.

    Args:
      slices: the number of such slices (pods), joined by the data-centre network.

    Raises:
      ValueError: if the name is invalid, or the compiler refuses the slice or is not
        installed.
    """
    if (match := _GPU_NAME.fullmatch(name)) and int(match[2]):
        if slices > 1:
            raise ValueError(
                f"mesh.slices={slices} is for TPUs, and {name} is one node of GPUs: "
                "set mesh.slices=1"
            )
        return gpus.devices(match[1], int(match[2]))
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"topology {name!r} is not one of v5e:ROWSxCOLUMNS, v6e:ROWSxCOLUMNS, "
            "v5p:XxYxZ, tpu7x:XxYxZ, for example v6e:4x4; nor GPUs of one node, for "
            f"example h100:8 ({', '.join(gpus.GPUS)})"
        )
    flat, given = match[1] in ("v5e", "v6e"), match[4] is None
    if flat != given:
        example = "4x4" if flat else "4x4x4"
        raise ValueError(
            f"{name!r} is not a slice of {match[1]}: name one like {match[1]}:{example}"
        )
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "compiling for a TPU needs its compiler: pip install 'jax[tpu]'"
        ) from error
    from jax.experimental import topologies

    sizes = [int(x) for x in match.groups()[1:] if x]
    more: dict[str, Any] = {}
    if set(sizes) == {1}:
        more["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        more["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **more
        )
    except Exception as error:  # jaxlib raises its own kinds
        known = "1x1, 2x2, 2x4, 4x4, 8x8, 16x16" if flat else "2x2x1, 2x2x2, 4x4x4"
        raise ValueError(
            f"the compiler has no slice {name!r}; {match[1]} has {known} and others "
            f"({str(error).splitlines()[0]})"
        ) from error
    return list(topology.devices)
