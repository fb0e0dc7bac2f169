"""NVIDIA GPUs by name: what XLA must know of a GPU that is not here."""

from __future__ import annotations

import os
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """A GPU as the CUDA driver describes it.

    Attributes:
      kind: jax's `device_kind`.
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      units: float32 units of each.
      threads: the most that a multiprocessor holds at a time.
      shared: shared memory of a multiprocessor, in KiB; a block may take 1 KiB less
        (on a T4, all).
      memory: GiB.
      cache: level 2 cache, in MiB.
      bandwidth: bandwidth of the memory, in GB/s.
      clock: GHz.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared: int
    memory: float
    cache: int
    bandwidth: float
    clock: float


# From openxla/xla, xla/backends/gpu/target_config/specs; T4 and L4 from deviceQuery.
# The memory of an H200 is what CUDA reports (PyTorch's "total capacity of 139.80 GiB"):
# XLA's file has 141 GiB, which is its nominal number of GB.
GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1024, 64, 14.76, 4, 320, 1.59),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100, 21.99, 48, 300, 2.04),
    "a100-40": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 39.42, 40, 1555, 1.41
    ),
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 79.26, 40, 2039, 1.41
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 79.11, 50, 3352, 1.98
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228, 139.8, 50, 4800, 1.98),
}


def usable_memory(name: str) -> float:
    """GiB of a GPU that jax takes for programs.

    It is 75 %, or the share in the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION.
    """
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)
    return share * GPUS[name].memory


def devices(name: str, count: int) -> list[Any]:
    """The devices of one node with `count` such GPUs.

    Raises:
      ValueError: if jax's CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{count}", target_config=_target(GPUS[name])
        )
    except NotImplementedError as error:
        raise ValueError(
            "compiling for a GPU needs its compiler: pip install 'jax[cuda12]'"
        ) from error
    return list(topology.devices)


def _target(gpu: Gpu) -> str:
    """XLA's `GpuTargetConfigProto` as text (xla/stream_executor)."""
    major, minor = gpu.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    shared = gpu.shared * 1024
    return f"""
gpu_device_info {{
  name: "{gpu.kind}"
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: {shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared - 1024 * (gpu.shared > 64)}
  device_memory_size: {round(gpu.memory * 2**30)}
  memory_bandwidth: {round(gpu.bandwidth * 1e9)}
  l2_cache_size: {gpu.cache * 2**20}
  clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
dnn_version_info {{ major: 9 minor: 10 }}
"""
