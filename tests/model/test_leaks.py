"""The leak proofs under XLA's default optimisation, which users run.

The suite lowers it to compile faster (`tests/conftest.py`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# Every implementation of attention, on both paths of "unpack", and every head.
PARTS = ["test_attention.py", "test_heads.py"], "leak and not 7-xla"
# Whole towers: two heads with the reference, and one with each other implementation.
# Of other towers' options: rotary positions, windows and gates, with "blocks".
TOWERS = (
    ["test_tower_options.py", "test_vision.py"],
    "leak and not xla-mean"
    " and not unpack-map and not unpack-max and not unpack-none"
    " and (not towers or qwen25-blocks)",
)


@pytest.mark.parametrize(
    ("files", "proofs", "at_least"),
    [
        pytest.param(*PARTS, 20, id="attention and heads"),
        pytest.param(*TOWERS, 7, id="towers", marks=pytest.mark.slow),
    ],
)
def test_no_leak_under_default_optimisation(files, proofs, at_least):
    """In one process, with the same tests: values bit-equal, gradients exactly 0."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    child = subprocess.run(
        [*command, "-k", proofs, *(str(FOLDER / name) for name in files)],
        cwd=FOLDER.parents[1],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed and int(passed[1]) >= at_least, child.stdout
