"""The check that runs survive, on a few kills."""

import pytest

from navit.bench import kills


@pytest.mark.slow
def test_runs_survive(capsys):
    assert kills.main(["--kills", "2", "--damages", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ends the same") == 7 and "2 of 2" in printed
