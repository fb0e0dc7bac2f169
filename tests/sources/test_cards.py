"""data/cards and data/builders: the instructions in them work."""

import ast
import csv
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import read_image

from navit import config
from navit.config import Config, DataConfig, Folder, Tfds
from navit.config import sources as datasets
from navit.sources.kinds import open_source

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
JPEGS = [row for row in ROWS if row["file"].endswith(".jpg")]
CARDS = sorted((ROOT / "data" / "cards").glob("*.toml"))
SOURCES = {
    name: getattr(datasets, name)
    for name in ("Folder", "TarShards", "ArrayRecords", "Tfds", "ParquetImages")
}


def source_of(line: str):
    """The source of a config's line, whose arguments are constants."""
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    return SOURCES[call.func.id](*map(ast.literal_eval, call.args), **options)


@functools.cache  # TFDS takes a name once
def builder_of(name: str):
    path = ROOT / "data" / "builders" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name.capitalize())


def test_there_are_cards():
    names = {card.stem for card in CARDS}
    assert {"imagenet2012", "coco_captions", "flickr30k", "cc12m"} < names


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_is_complete_and_its_line_is_a_source(path):
    card = tomllib.loads(path.read_text())
    texts = ("name", "about", "licence", "homepage", "size", "get", "config")
    assert set(texts) <= set(card) <= {*texts, "notes", "fields"}
    assert all(card[key].strip() for key in texts) and card["fields"]
    assert card["homepage"].startswith("https://")
    source = source_of(card["config"])
    whole = Config(data=DataConfig(train=source))
    assert config.from_json(json.loads(json.dumps(config.to_json(whole)))) == whole
    for name in ("image", "caption", "label"):
        field = getattr(source, name, "")
        if field and not isinstance(source, datasets.TarShards):
            assert field in card["fields"]
    if isinstance(source, Tfds) and "data/builders" in card["get"]:
        assert builder_of(source.name).name == source.name
        assert f"data/builders/{source.name}.py" in card["get"]


def test_the_lines_of_the_docs_are_sources():
    text = (ROOT / "docs" / "data.md").read_text()
    lines = re.findall(r"\| `((?:\w+)\([^`]*\))` \|", text)
    names = {line.partition("(")[0] for line in lines}
    assert names == {*SOURCES, "Synthetic", "Mixture", "TfRecords"}
    for line in lines:
        if line.partition("(")[0] in SOURCES:
            assert source_of(line)


def prepare(name: str, manual: Path, root: Path) -> None:
    """Runs the command that the card names; it imports no TensorFlow."""
    path = ROOT / "data" / "builders" / f"{name}.py"
    code = (
        f"import runpy, sys; sys.argv = {[str(path), str(manual), str(root)]!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert 'tensorflow' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def card_source(name: str, **options) -> dict:
    card = tomllib.loads((ROOT / "data" / "cards" / f"{name}.toml").read_text())
    found = source_of(card["config"])
    return open_source(
        Tfds(found.name, caption=found.caption, label=found.label, **options)
    )


def assert_holds(source, rows, captions) -> None:
    folder = open_source(Folder(str(SAMPLE)))
    images = {
        Path(folder.name(i)).name: read_image(folder, i) for i in range(len(folder))
    }
    found = {
        read_image(source, i): source.record(i).captions for i in range(len(source))
    }
    assert found == {images[row["file"]]: captions(row) for row in rows}


def five(row: dict) -> tuple[str, ...]:
    # With a character that ends a line for some readers, and is a letter here.
    return tuple(f"{row['caption']} \u2028 {k}" for k in range(5))


@pytest.mark.parametrize("karpathy", [True, False])
def test_flickr30k_is_built_from_its_official_files(tmp_path, karpathy):
    manual = tmp_path / "manual"
    (manual / "flickr30k-images").mkdir(parents=True)
    lines = []
    for row in JPEGS:
        shutil.copy(SAMPLE / row["file"], manual / "flickr30k-images")
        lines += [f"{row['file']}#{k}\t{text}" for k, text in enumerate(five(row))]
    (manual / "results_20130124.token").write_text(
        "\n".join(lines[::-1]) + "\n", encoding="utf-8"
    )
    splits = ["train"] * (len(JPEGS) - 3) + ["val", "test"]  # the last has none
    images = [
        {"filename": row["file"], "split": split, "sentences": []}
        for row, split in zip(JPEGS, splits, strict=False)
    ]
    if karpathy:
        text = json.dumps({"images": images, "dataset": "flickr30k"})
        (manual / "dataset_flickr30k.json").write_text(text)
    prepare("flickr30k", manual, tmp_path / "data")
    data_dir = str(tmp_path / "data")
    if not karpathy:
        source = card_source("flickr30k", split="full", data_dir=data_dir)
        assert_holds(source, JPEGS, five)
        return
    for split in ("train", "val", "test"):
        rows = [r for r, s in zip(JPEGS, splits, strict=False) if s == split]
        source = card_source("flickr30k", split=split, data_dir=data_dir)
        assert_holds(source, rows, five)


def test_textcaps_is_built_from_its_official_files(tmp_path):
    manual = tmp_path / "manual"
    (manual / "train_images").mkdir(parents=True)
    parts = {"train": JPEGS[:-4], "val": JPEGS[-4:]}
    for split, rows in parts.items():
        data = []
        for row in rows:
            shutil.copy(SAMPLE / row["file"], manual / "train_images")
            for number, text in enumerate(five(row)):
                data.append(
                    {
                        "image_id": Path(row["file"]).stem,
                        "caption_id": number,
                        "caption_str": text,
                        "reference_strs": list(five(row)),
                        "set_name": split,
                    }
                )
        text = json.dumps({"dataset_name": "textcaps", "data": data})
        (manual / f"TextCaps_0.1_{split}.json").write_text(text)
    prepare("textcaps", manual, tmp_path / "data")
    for split, rows in parts.items():
        source = card_source("textcaps", split=split, data_dir=str(tmp_path / "data"))
        assert_holds(source, rows, five)
