"""Test-wide settings: 8 forced host devices, checked shapes, warnings as errors."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is compilation, and this halves it. Child processes
# inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# Within a run of the suite, nothing is compiled twice.
_cache = tempfile.TemporaryDirectory(prefix="navit-test-cache-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Every `Float[Array, "b n d"]` in navit is checked on every call of every test.
install_import_hook("navit", "beartype.beartype")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
