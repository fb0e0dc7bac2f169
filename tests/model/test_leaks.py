"""The leak proofs under XLA's default optimisation, which users run.

The suite lowers it to compile faster (`tests/conftest.py`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = [
    "test_attention.py",
    "test_heads.py",
    "test_tower_options.py",
    "test_vision.py",
]
# Every implementation of attention, on both paths of "unpack", and every head. In whole
# towers two heads with the reference, and one with each of the others. Of other towers'
# options, rotary positions, windows and gates, with the implementation of long rows.
PROOFS = (
    "leak and not 7-xla and not xla-mean"
    " and not unpack-map and not unpack-max and not unpack-none"
    " and (not towers or qwen25-blocks)"
)


def test_no_leak_under_default_optimisation():
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
        [*command, "-k", PROOFS, *(str(FOLDER / name) for name in FILES)],
        cwd=FOLDER.parents[1],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed and int(passed[1]) >= 20, child.stdout
