"""Executes the notebooks, and holds each .ipynb to the .py beside it.

python .ci/notebooks.py [NAME ...]    checks all notebooks, or these
python .ci/notebooks.py --write       also writes the .ipynb files with their outputs

--write also copies the project's address, `url` in setup.cfg, into the badges and the
install cells. Both need `pip install -e ".[notebooks]"`.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import (
        CellExecutionError,
        CellTimeoutError,
        DeadKernelError,
    )
except ImportError as error:  # --help needs none of them
    missing = f'{error}: pip install -e ".[notebooks]"'
else:
    missing = ""

ROOT = Path(__file__).resolve().parent.parent
SECONDS, BYTES = 600, 700_000  # of one cell; of a file
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "file_extension": ".py"},
}


def addressed(text: str) -> str:
    """The text with setup.cfg's address in its badges and install cells."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    address = config["metadata"]["url"]
    owner_and_name = address.removeprefix("https://github.com/")
    text = re.sub(
        r"(?<=colab\.research\.google\.com/github/)[^/\s]+/[^/\s]+(?=/blob/)",
        owner_and_name,
        text,
    )
    return re.sub(r'(?<=git clone -q --depth 1 )https://[^\s"]+', address, text)


def read(script: Path) -> nbformat.NotebookNode:
    """The notebook of a .py, without outputs."""
    notebook = jupytext.reads(addressed(script.read_text()), fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def execute(notebook: nbformat.NotebookNode) -> str:
    """Executes a notebook in a fresh kernel; returns what failed, or an empty text."""
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        said = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        said = f"it takes more than {SECONDS} seconds"
    except DeadKernelError:
        said = "the kernel died"
    else:
        return ""
    # The last code cell that started: those after it have no count.
    cell = max(
        (i for i, c in enumerate(notebook.cells) if c.get("execution_count")), default=0
    )
    return f"cell {cell} ({notebook.cells[cell].source.splitlines()[0]!r}): {said}"


def disagreement(script: Path, notebook: nbformat.NotebookNode) -> str:
    """How the stored files differ from the .py and the address, or an empty text."""
    stored = script.with_suffix(".ipynb")
    if not stored.exists():
        return f"{stored.name} is missing"
    text = stored.read_text()
    other = nbformat.reads(text, as_version=4)
    if len(text) > BYTES:
        return f"{stored.name} has {len(text):,} bytes, more than {BYTES:,}"
    if str(ROOT) in text or str(Path.home()) + "/" in text:
        return f"{stored.name} shows a path of this machine in its outputs"
    if script.read_text() != addressed(script.read_text()):
        return f"{script.name} has another address than setup.cfg"
    if len(other.cells) != len(notebook.cells):
        return f"{len(other.cells)} cells in {stored.name}, not {len(notebook.cells)}"
    for number, (ours, theirs) in enumerate(
        zip(notebook.cells, other.cells, strict=True)
    ):
        if (ours.cell_type, ours.source) != (theirs.cell_type, theirs.source):
            return f"cell {number} of {stored.name} is not that of {script.name}"
        if ours.cell_type == "code" and not theirs.execution_count:
            return f"cell {number} of {stored.name} was not executed"
    return ""


def check(script: Path, *, write: bool) -> str:
    """Checks one notebook; returns a line about what is wrong, or an empty text."""
    start = time.monotonic()
    notebook = read(script)
    failure = execute(notebook)
    print(f"{script.stem}: {time.monotonic() - start:.0f} s", flush=True)
    if not failure and write:
        notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds versions
        script.write_text(addressed(script.read_text()))
        nbformat.write(notebook, script.with_suffix(".ipynb"))
    failure = failure or disagreement(script, notebook)
    if f"notebooks/{script.stem}.ipynb" not in (ROOT / "README.md").read_text():
        failure = failure or "README.md has no badge for it"
    return failure and f"{script.stem}: {failure}"


def main() -> None:
    """Checks or writes all notebooks, two at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_packing")
    parser.add_argument("--write", action="store_true", help="write the .ipynb files")
    arguments = parser.parse_args()
    if missing:
        sys.exit(missing)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What the cells start, such as `navit`, is that of this environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = arguments.names or [p.stem for p in (ROOT / "notebooks").glob("*.py")]
    readme = ROOT / "README.md"
    if arguments.write:
        readme.write_text(addressed(readme.read_text()))
    failures = []
    if readme.read_text() != addressed(readme.read_text()):
        failures.append("README.md has another address than setup.cfg")
    scripts = [(ROOT / "notebooks" / name).with_suffix(".py") for name in sorted(names)]
    with ThreadPoolExecutor(2) as pool:
        checked = pool.map(lambda p: check(p, write=arguments.write), scripts)
        failures += filter(None, checked)
    if failures:
        remedy = "run `python .ci/notebooks.py --write` if the .py is right"
        sys.exit("\n".join([*failures, remedy]))


if __name__ == "__main__":
    main()
