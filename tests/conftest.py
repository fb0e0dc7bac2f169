"""Test-wide settings: 8 forced host devices, checked shapes, warnings as errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# Every `Float[Array, "b n d"]` in navit is checked on every call of every test.
install_import_hook("navit", "beartype.beartype")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
