"""Compares the numbers of this tree with those of another commit, bit by bit.

  python .ci/same_numbers.py REVISION

Both trees run with the same packages, seeds and configs: plans and pixels of training
batches, packed photographs, losses and parameters after some steps, exported weights,
and embeddings. Run it after a change that should not change any number. Exits with 1,
and names what differs, if something does.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
# The tree under test: another one has other configs.
TREE = Path(os.environ.get("PYTHONPATH", HERE))
# Fields of a batch that every revision has.
FIELDS = ("text", "label", "size")
# Without the drawn dataset's 20,000 images and 300 steps.
SHORT = ("train.steps=4", "train.checkpoint_every=4", "data.train.size=300")


def digest(*arrays: Any) -> str:
    checksum = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        checksum.update(f"{array.shape} {array.dtype}".encode())
        checksum.update(np.ascontiguousarray(array).tobytes())
    return checksum.hexdigest()[:16]


def photographs() -> list[Path]:
    return sorted((TREE / "data" / "sample").rglob("*.jpg"))


def batches(name: str, *overrides: str) -> Iterator[tuple[str, str]]:
    """The first training batches of a config, field by field."""
    from navit import config as config_lib
    from navit.input import pipeline

    config = config_lib.load(TREE / "configs" / f"{name}.py", overrides)
    source = pipeline.open_source(config.data.train)
    made = list(pipeline.train_batches(config, source))
    label = " ".join([name, *overrides]).replace(str(TREE), ".")
    for field in made[0].images._fields:
        values = [getattr(batch.images, field) for batch in made]
        yield f"batches of {label}: {field}", digest(*values)
    for field in FIELDS:
        values = [getattr(batch, field) for batch in made]
        yield f"batches of {label}: {field}", digest(*values)


def training(loss: str, *overrides: str) -> Iterator[tuple[str, str]]:
    """Losses and parameters of a short run, by its metrics and its checkpoint."""
    import jax

    import navit
    from navit import config as config_lib
    from navit.train import loop

    path = TREE / "configs" / "quickstart.py"
    short = (*SHORT, "train.log_every=1", "eval.budgets=64,100", *overrides)
    short += ("data.eval.size=16",)
    try:
        config = config_lib.load(path, [*short, f"train.losses={loss}"])
    except ValueError:  # a revision from before that key
        config = config_lib.load(path, [*short, f"train.loss={loss}"])
    label = " ".join([loss, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, Path(folder))
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        for name in ("loss", "grad_norm"):
            values = [float(json.loads(line)[name]).hex() for line in lines]
            yield f"training with {label}: {name}", " ".join(values)
        model = navit.load(folder)
        leaves = jax.tree.leaves(model.model)
        yield f"training with {label}: parameters", digest(*leaves)
        table = json.loads((Path(folder) / "budgets.json").read_text())
        for budget, name, value in results(table):
            yield f"training with {label}: {name} at {budget}", str(value)


def results(table: dict[str, Any]) -> Iterator[tuple[int, str, float]]:
    """(budget, name, value) of the accuracies and recalls in budgets.json."""
    if "budgets" in table:  # a revision from before rows
        for budget, line in table["budgets"].items():
            for name, value in line.items():
                if name.endswith(("_accuracy", "_top5", "_r1", "_r5", "_r10")):
                    yield int(budget), name.replace("_classifier_", "_"), value
        return
    for row in table["rows"]:
        for name, value in row["metrics"].items():
            if name in ("accuracy", "top5"):
                name = f"{row['set']}_{name}"
            if name != "calibration_error":
                yield row["budget"], name, value


def pixels() -> Iterator[tuple[str, str]]:
    import navit

    for tokens in (64, 256, 1024):
        packed = navit.pack(photographs(), max_tokens=tokens, row_tokens=1024)
        yield f"packed photographs at {tokens} tokens", digest(*packed)


def weights() -> Iterator[tuple[str, str]]:
    """Exports of a random model, byte by byte, and what is loaded from them."""
    import dataclasses

    from flax import nnx

    import navit
    from navit.config import (
        Config,
        DataConfig,
        Folder,
        ModelConfig,
        TextConfig,
        VisionConfig,
    )
    from navit.embed import Embedder
    from navit.model.two_tower import TwoTower

    tower = dict(width=64, depth=2, mlp_dim=96, num_heads=2)
    vision = VisionConfig(**tower)
    text = TextConfig(length=16, **tower)
    cases = {
        "naflex": vision,
        "one size": dataclasses.replace(vision, fixed_grid=True),
    }
    data = DataConfig(train=Folder(), eval=Folder())
    images = photographs()[:8]
    for case, tower_config in cases.items():
        config = Config(model=ModelConfig(vision=tower_config, text=text), data=data)
        model = TwoTower(config.model, rngs=nnx.Rngs(3))
        embedder = Embedder(model, config, step=0)
        for format in ("huggingface", "big_vision"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / ("w.npz" if format == "big_vision" else "w")
                navit.save(embedder, out, format)
                files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
                for file in files:
                    # A zip file stores times: its members are compared instead.
                    if file.suffix == ".npz":
                        with np.load(file) as archive:
                            sum_ = digest(*(archive[n] for n in sorted(archive.files)))
                    else:
                        sum_ = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
                    yield f"{case} as {format}: {file.name}", sum_
                tokenizer = "model.text.tokenizer=bytes"
                loaded = navit.load(out, overrides=[tokenizer])
                z = loaded.embed_images(images, max_tokens=256)
                yield f"{case} as {format}: embeddings", digest(z)
                t = loaded.embed_texts(["a red circle", "two blue dots"])
                yield f"{case} as {format}: texts", digest(t)


def numbers() -> Iterator[tuple[str, str]]:
    yield from batches("quickstart", *SHORT)
    yield from batches("quickstart", *SHORT, "data.caption_rows=4", "data.workers=1")
    sample = f"data.train.path={TREE / 'data' / 'sample'}"
    short = ("train.steps=4", "data.rows=4", "model.text.tokenizer=bytes", sample)
    yield from batches("photos", *short)
    yield from pixels()
    yield from training("sigmoid")
    yield from training("softmax", "data.caption_rows=4", "train.microbatches=2")
    yield from training("classification", "model.vision.num_classes=7")
    yield from weights()


def run(tree: Path) -> dict[str, str]:
    """The numbers of another tree's navit, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--print"]
    paths = {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=os.environ | paths, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(dict(numbers())))
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    git = ["git", "-C", str(HERE), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        subprocess.run([*git, "add", "--detach", there, sys.argv[1]], check=True)
        try:
            before, now = run(there), run(HERE)
        finally:
            subprocess.run([*git, "remove", "--force", there], check=True)
    changed = [name for name in before if before[name] != now.get(name)]
    for name in changed:
        print(f"differs: {name}: {before[name]} -> {now.get(name)}")
    print(f"{len(before) - len(changed)} of {len(before)} numbers are bit-equal")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
