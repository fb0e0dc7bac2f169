"""The `navit` commands of docs/launching.md: each parses, and its config holds."""

import re
import shlex
import string
from pathlib import Path

import pytest

from navit import cli, commands, config

ROOT = Path(__file__).parents[2]

# What the launchers set.
SHELL = {"HEAD": "host0", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_RANK": "0"}


def navit_commands():
    """The words after `navit` of each command in a block of code, in order."""
    text = (ROOT / "docs/launching.md").read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"\bnavit ((?:train|compile|index|eval|check) [^\"\n]*)", code)
    return [shlex.split(string.Template(x).substitute(SHELL)) for x in found]


def test_every_launcher_has_a_command():
    names = [words[0] for words in navit_commands()]
    # gcloud, XPK, SkyPilot on TPUs and GPUs, Slurm, one machine.
    assert names.count("train") == 6
    assert {"compile", "index"} <= {*names}


@pytest.mark.parametrize("words", navit_commands())
def test_commands_parse(words, monkeypatch):
    parsed = []
    monkeypatch.chdir(ROOT)
    for run in ("train", "compile_", "index", "evaluate", "check"):
        monkeypatch.setattr(commands, run, lambda args: parsed.append(args) or 0)
    assert cli.main(words) == 0
    [args] = parsed
    loaded = config.load(args.config, args.overrides)
    if words[0] == "train" and loaded.mesh.fsdp > 1:
        assert args.fail_on_sigterm and loaded.data.lanes
