"""The README's first command, whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quickstart_is_five_times_better_than_chance_at_every_budget(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e . && navit train configs/quickstart.py" in readme
    navit = Path(sys.executable).with_name("navit")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [navit, "train", "configs/quickstart.py", "--workdir", tmp_path],
        cwd=ROOT,
        env=env,
        check=True,
    )
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    coarse = [row for row in rows if row["set"] == "coarse"]
    assert [row["budget"] for row in coarse] == [256, 729, 1024]
    for row in coarse:
        assert row["metrics"]["accuracy"] >= 5 * row["chance"]["accuracy"]
    assert (tmp_path / "budgets.png").stat().st_size > 0
    assert (tmp_path / "metrics.jsonl").stat().st_size > 0
