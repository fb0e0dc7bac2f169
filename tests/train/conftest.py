"""What the tests of training share: a whole run, and compiled steps."""

import pytest
from helpers import tiny_config

from navit.train import loop


@pytest.fixture(scope="session", autouse=True)
def steps_are_traced_once():
    """Runs of one config share their step: to trace it is half of a short run."""
    real, steps = loop.make_train_step, {}

    def make(config, optimizer, *others):
        if (config, *others) not in steps:
            steps[config, *others] = real(config, optimizer, *others)
        return steps[config, *others]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make)
        yield


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, steps_are_traced_once):
    """The work directory of a whole run of `tiny_config`."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert loop.train(tiny_config(), workdir)
    return workdir
