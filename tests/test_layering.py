"""Imports point one way, and importing navit costs nothing."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "navit").rglob("*.py"))

# What each part may import of navit: the arrows point one way.
CONFIG = ("navit.config", "navit.config_model", "navit.config_data", "navit.datasets")
BASE = (*CONFIG, "navit.batch")
MODEL = (*BASE, "navit.sharding", "navit.model")
ALLOWED = {
    "navit.fields": (),
    "navit.datasets": (),
    "navit.config": ("navit.fields", *CONFIG),
    "navit.config_model": ("navit.fields",),
    "navit.config_data": ("navit.fields", "navit.datasets"),
    "navit.batch": (),
    "navit.files": (),
    "navit.flops": BASE,
    "navit.sharding": BASE,
    "navit.model": MODEL,
    "navit.losses": MODEL,
    "navit.optim": MODEL,
    "navit.input": (*BASE, "navit.files", "navit.input"),
}
# Parts that may import nearly all, and what they may not.
FORBIDDEN = {
    "navit.evals": ("navit.train", "navit.optim", "navit.losses"),
    "navit.embed": ("navit.train", "navit.evals", "navit.losses", "navit.optim"),
}
NO_JAX = ("navit.fields", "navit.flops", *BASE, "navit.input")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def is_in(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, also in functions, but not under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from running_nodes(child)


def imports(module: str) -> set[str]:
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in running_nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from navit import config` imports the module navit.config.
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    return found


def test_the_reader_sees_imports_in_functions_and_not_those_for_type_checking():
    assert "navit.train.loop" in imports("navit.commands")
    assert "navit.config" in imports("navit.commands")
    assert is_in("navit.embed", tuple(imports("navit.weights")))
    assert not any(name.startswith("navit") for name in imports("navit"))


@pytest.mark.parametrize("part", ALLOWED)
def test_a_lower_part_imports_only_what_is_below_it(part):
    members = [module for module in MODULES if is_in(module, (part,))]
    assert members, f"there is no {part}"
    for module in members:
        for name in imports(module):
            if is_in(name, ("navit",)) and name != "navit":
                assert is_in(name, ALLOWED[part]), f"{module} imports {name}"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_an_upper_part_does_not_reach_across(part):
    members = [module for module in MODULES if is_in(module, (part,))]
    assert members, f"there is no {part}"
    for module in members:
        for name in imports(module):
            assert not is_in(name, FORBIDDEN[part]), f"{module} imports {name}"


@pytest.mark.parametrize("part", NO_JAX)
def test_the_host_side_does_not_import_jax(part):
    for module in MODULES:
        if is_in(module, (part,)):
            for name in imports(module):
                assert not is_in(name, JAX), f"{module} imports {name}"


@pytest.mark.parametrize(
    "part", ["navit.cli", "navit.commands", "navit.convert", "navit.bench"]
)
def test_nothing_imports_the_ends(part):
    for module in MODULES:
        # The command line may call on the two tools, and each on its own files.
        if is_in(module, (part, "navit.cli", "navit.commands")):
            continue
        # navit.load takes every format, and a benchmark measures them.
        if part == "navit.convert" and module in (
            *("navit.weights", "navit.bench.convert", "navit.bench.embed"),
        ):
            continue
        for name in imports(module):
            assert not is_in(name, (part,)), f"{module} imports {name}"


def test_only_one_file_knows_orbax():
    knowing = {m for m in MODULES if any(is_in(n, ("orbax",)) for n in imports(m))}
    assert knowing == {"navit.train.checkpoint"}


def test_importing_navit_and_its_command_line_loads_nothing_heavy():
    heavy = [*JAX, "grain", "matplotlib", "PIL", "numpy"]
    code = (
        f"import sys, navit, navit.cli;print(*[m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == []


def test_a_folder_named_navit_does_not_hide_the_installed_package(tmp_path):
    """From the folder above a clone, Python sees the clone as a namespace package."""
    (tmp_path / "navit").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run(
        [sys.executable, "-c", "import navit; navit.grid_for"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr


def test_the_input_side_runs_where_there_is_no_jax():
    code = (
        "import sys;"
        f"sys.modules.update(dict.fromkeys({JAX}));"  # importing one of them raises
        "import numpy as np, navit;"
        "navit.pack([np.zeros((40, 40, 3), np.uint8)]).check()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr


def test_no_file_is_a_drawer_for_everything():
    assert FILES
    assert [*(ROOT / "navit").rglob("utils.py"), *ROOT.glob("tests/**/utils.py")] == []
