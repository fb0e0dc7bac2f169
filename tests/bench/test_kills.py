"""The check that runs survive, on one kill and one damage."""

import pytest

from navit.bench import kills


@pytest.mark.slow
def test_runs_survive(capsys):
    assert kills.main(["--kills", "1", "--damages", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ends the same") == 5 and "1 of 1" in printed
