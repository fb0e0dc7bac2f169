"""Test-wide settings: 8 forced host devices, checked shapes, warnings as errors."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is compilation, and this halves it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# A shell's background jobs ignore SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing is compiled twice in a run of the suite: the first process makes the cache,
# and pytest's workers and the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="navit-test-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many objects and little garbage: collecting less often saves time.
gc.set_threshold(20_000)
# Every `Float[Array, "b n d"]` in navit is checked on every call of every test.
install_import_hook("navit", "beartype.beartype")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def exact_ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of the model, no array gains axes by broadcasting."""
    strict = request.path.parent.name in ("model", "kernels")
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield
