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

# What each part may import from navit besides itself: the arrows point one way.
HOST = ("navit.config", "navit.batch", "navit.files")
DEVICE = ("navit.config", "navit.batch", "navit.sharding")
ALLOWED = {
    "navit.config": ("navit.plan.strategies",),
    "navit.batch": (),
    "navit.files": (),
    "navit.sharding": ("navit.config", "navit.batch"),
    "navit.libtpu": (),
    "navit.kernels": DEVICE,
    "navit.model": (*DEVICE, "navit.kernels"),
    "navit.losses": (*DEVICE, "navit.kernels", "navit.model"),
    "navit.plan": HOST,
    "navit.sources": HOST,
    "navit.input": (*HOST, "navit.plan", "navit.sources"),
    "navit.compare": (
        *HOST,
        "navit.options",
        "navit.plan",
        "navit.sources",
        "navit.input",
    ),
}
# Parts that may import nearly everything, and what they may not import.
FORBIDDEN = {
    "navit.evals": ("navit.train", "navit.losses"),
    "navit.embed": ("navit.train", "navit.evals", "navit.losses"),
    "navit.embed_batches": ("navit.train", "navit.evals", "navit.losses"),
    "navit.embed_features": ("navit.train", "navit.evals", "navit.losses"),
    "navit.embed_files": ("navit.train", "navit.evals", "navit.losses"),
    "navit.embed_rows": ("navit.train", "navit.evals", "navit.losses"),
    "navit.embed_views": ("navit.train", "navit.evals", "navit.losses"),
    "navit.convert": ("navit.train", "navit.evals", "navit.losses", "navit.embed"),
    "navit.train": ("navit.convert", "navit.weights"),
}
NO_JAX = (
    "navit.config",
    "navit.batch",
    "navit.libtpu",
    "navit.plan",
    "navit.sources",
    "navit.input",
    "navit.compare",
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def is_in(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, in functions too, but not under `if TYPE_CHECKING:`."""
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
                assert is_in(name, (part, *ALLOWED[part])), f"{module} imports {name}"


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
    "part",
    ["navit.cli", "navit.commands", "navit.compile", "navit.bench", "navit.machine"],
)
def test_nothing_imports_the_ends(part):
    for module in MODULES:
        # The command line calls the tools, a benchmark measures compiled code, and each
        # tool has several files.
        ends = (part, "navit.__main__", "navit.cli", "navit.commands", "navit.bench")
        if not is_in(module, ends):
            for name in imports(module):
                assert not is_in(name, (part,)), f"{module} imports {name}"


def test_only_one_file_imports_orbax():
    knowing = {m for m in MODULES if any(is_in(n, ("orbax",)) for n in imports(m))}
    assert knowing == {"navit.train.checkpoint"}


def test_importing_navit_and_showing_its_help_loads_nothing_heavy():
    heavy = [*JAX, "grain", "matplotlib", "PIL", "numpy", "safetensors", "tokenizers"]
    code = (
        "import sys, navit, navit.cli\n"
        "try: navit.cli.main(['--help'])\n"
        f"finally: print('loaded', *[m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "usage: navit" in out.stdout
    assert out.stdout.splitlines()[-1] == "loaded"


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


def test_a_file_is_found_by_its_name():
    """No two files share a name, those of `config/` aside, and none is `utils.py`."""
    names = [x.name for x in FILES if x.parent.name != "config"]
    names = [name for name in names if name != "__init__.py"]
    assert names and "utils.py" not in names
    assert len(names) == len(set(names)), sorted(names)
