"""navit.sources.source: a folder of photographs with a table."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import read_image
from PIL import Image

from navit.config import DataConfig, Folder
from navit.input.pipeline import open_eval_source
from navit.sources.folder import FolderSource, same_table
from navit.sources.storage import Local, open_file

SAMPLE = Path(__file__).parents[2] / "data" / "sample"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six small images and no table."""
    for i in range(6):
        image = Image.new("RGB", (20 + i, 30), (40 * i, 0, 0))
        image.save(tmp_path / f"{i}.png")
    return tmp_path


def open_folder(folder: Path, table: str | None = None, name="table.csv", **options):
    if table is not None:
        (folder / name).write_text(table, encoding="utf-8")
    return FolderSource(Folder(path=str(folder), **options))


def error_of(*args, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_folder(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def captions(source: FolderSource) -> dict[str, tuple[str, ...]]:
    return {
        Path(source.name(i)).name: source.record(i).captions for i in range(len(source))
    }


def test_a_csv_with_several_rows_a_file(folder):
    source = open_folder(folder, 'file,caption\n1.png,one\n0.png,"a, b"\n1.png,uno\n')
    assert captions(source) == {"1.png": ("one", "uno"), "0.png": ("a, b",)}
    assert source.sizes.tolist() == [[30, 21], [30, 20]]
    assert read_image(source, 0) == (folder / "1.png").read_bytes()
    assert source.tasks == {}


def test_a_caption_in_quotes_may_have_commas_quotes_and_lines(folder):
    caption = 'two,\nor "three"\n\nlines'
    quoted = caption.replace('"', '""')
    source = open_folder(folder, f'caption,file\n\n"{quoted}",0.png\n5" nails,1.png\n')
    assert captions(source) == {"0.png": (caption,), "1.png": ('5" nails',)}


def test_a_jsonl_with_a_list_of_captions(folder):
    rows = [
        {"file": "0.png", "caption": ["one", "uno"]},
        {"file": "1.png", "caption": "two"},
        {"file": "0.png", "caption": "eins"},
    ]
    table = "\n\n".join(json.dumps(row) for row in rows)
    source = open_folder(folder, table, "table.jsonl")
    assert captions(source) == {"0.png": ("one", "uno", "eins"), "1.png": ("two",)}


@pytest.mark.parametrize("file", ["file", "file_name", "filepath"])
@pytest.mark.parametrize("caption", ["caption", "text", "title"])
def test_the_column_names_of_other_trainers(folder, file, caption):
    source = open_folder(folder, f"{caption},{file}\none,0.png\n")
    assert captions(source) == {"0.png": ("one",)}


def test_a_byte_order_mark_is_no_part_of_the_first_column(folder):
    source = open_folder(folder, "\ufefffile,caption\r\n0.png,één\r\n")
    assert captions(source) == {"0.png": ("één",)}


def test_labels_are_a_task(folder):
    source = open_folder(
        folder, "file,caption,label\n0.png,x,dog\n1.png,x,\n2.png,x,cat\n3.png,x,dog\n"
    )
    (task,) = source.tasks.values()
    assert sorted(task.class_names) == ["cat", "dog"]
    names = [None if i < 0 else task.class_names[i] for i in task.labels]
    assert names == ["dog", None, "cat", "dog"]


def test_an_image_without_a_caption_is_captioned_by_its_class(folder):
    source = open_folder(folder, "file,label\n0.png,dog\n1.png,cat\n")
    assert captions(source) == {"0.png": ("dog",), "1.png": ("cat",)}
    table = "file,caption,label\n0.png,,dog\n1.png,a cat,cat\n"
    source = open_folder(folder, table)
    assert captions(source) == {"0.png": ("dog",), "1.png": ("a cat",)}


def test_a_row_with_a_negative_label_and_no_caption_is_left_out(folder, caplog):
    """A negative label means that there is none."""
    table = "file,label\n0.png,1\n1.png,-1\n"
    with pytest.raises(ValueError, match=r"1 of 2 captions .*line 3 \(1\.png\)"):
        open_folder(folder, table)
    source = open_folder(folder, table, missing=0.5)
    assert captions(source) == {"0.png": ("1",)}
    assert "1 of 2 captions of" in caplog.text


def test_integer_labels_count_as_integers(folder):
    labels = (10, 0, 2, 1, 11, -1)
    lines = "".join(f"{i}.png,x,{label}\n" for i, label in enumerate(labels))
    task = open_folder(folder, "file,caption,label\n" + lines).tasks["label"]
    assert task.class_names == ("0", "1", "2", "10", "11")
    assert task.labels.tolist() == [3, 0, 2, 1, 4, -1]


def test_the_sample_opens_with_sizes_as_seen():
    source = FolderSource(Folder(path=str(SAMPLE)))
    assert len(source) == 17
    sizes = {
        Path(source.name(i)).name: tuple(source.sizes[i].tolist())
        for i in range(len(source))
    }
    assert sizes["rocket_tall.jpg"] == (321, 65)  # from the table of its README
    assert sizes["coffee_rotated.jpg"] == (400, 600)  # stored lying on its side
    assert min(source.tasks["label"].labels) >= 0


def test_an_unreadable_image_is_left_out_with_a_warning(folder, caplog):
    (folder / "1.png").write_bytes(b"not an image")
    table = "file,caption,label\n0.png,x,a\n1.png,y,b\n2.png,z,c\n"
    with caplog.at_level(logging.WARNING, logger="navit"):
        source = open_folder(folder, table)
    assert list(captions(source)) == ["0.png", "2.png"]
    assert source.sizes.tolist() == [[30, 20], [30, 22]]
    (record,) = caplog.records
    assert "1.png" in record.getMessage()
    assert len(source.tasks["label"].labels) == 2


def test_every_way_to_write_a_path_inside_the_folder_is_the_same_image(folder):
    link = folder.with_name(f"{folder.name} link")
    link.symlink_to(folder)
    ways = ["0.png", f"{folder}/0.png", f"{link}/0.png", "./x/..//0.png"]
    ways.append(f"../{link.name}/0.png")
    table = "file,caption\n" + "".join(f"{way},{i}\n" for i, way in enumerate(ways))
    assert captions(open_folder(link, table)) == {"0.png": tuple("01234")}


MISSING = "file,caption\n" + "".join(f"{i}.png,c{i}\n" for i in range(10))


def test_missing_files_are_counted_and_some_are_named(folder, caplog):
    for gone in (1, 3):
        (folder / f"{gone}.png").unlink()
    message = error_of(folder, MISSING)
    assert "6 of 10 files of" in message and "'1.png', '3.png', '6.png', ..." in message
    assert "set missing=0.6 " in message
    assert "'3.png'" in error_of(folder, missing=0.59)
    source = open_folder(folder, missing=0.6)
    assert captions(source) == {f"{i}.png": (f"c{i}",) for i in (0, 2, 4, 5)}
    (record,) = caplog.records
    assert "6 of 10 files" in record.getMessage() and "'3.png'" in record.getMessage()
    # The part to evaluate on lies in the same folder, with the same files missing.
    data = DataConfig(
        train=Folder(str(folder), split="train", holdout=0.5, missing=0.6),
        eval=Folder(split="eval", holdout=0.5),
    )
    held = captions(open_eval_source(data))
    assert held and set(held) < set(captions(source))


def test_the_share_in_the_error_covers_missing_captions_and_missing_files(folder):
    rows = "".join(f"{i}.png,x\n" for i in range(6))
    table = f"file,caption\n{rows}6.png,\n7.png,x\n"
    assert "set missing=0.2 " in error_of(folder, table)  # of 1 of 8 captions
    assert len(open_folder(folder, missing=0.2)) == 6  # and of 1 of 7 files


def test_missing_captions_are_counted_and_some_are_named(folder, caplog):
    table = "file,caption,label\n0.png,x,\n1.png,,\n2.png,,dog\n3.png,,\n0.png,,\n"
    message = error_of(folder, table)
    assert "3 of 5 captions" in message and "line 3 (1.png)" in message
    assert "set missing=0.6 " in message
    source = open_folder(folder, table, missing=0.6)
    assert captions(source) == {"0.png": ("x",), "2.png": ("dog",)}
    (record,) = caplog.records
    assert "line 5 (3.png)" in record.getMessage()


def test_a_named_pipe_is_left_out_and_does_not_block(folder, caplog):
    (folder / "1.png").unlink()
    os.mkfifo(folder / "1.png")
    source = open_folder(folder, "file,caption\n0.png,x\n1.png,y\n")
    assert list(captions(source)) == ["0.png"]
    (record,) = caplog.records
    assert "1.png is not a regular file" in record.getMessage()
    for read in (open_file, lambda path: Local().read_range(path, 0, 1)):
        with pytest.raises(OSError, match="not a regular file"):
            read(str(folder / "1.png"))


def many(folder: Path, count: int = 60) -> str:
    for i in range(6, count):
        shutil.copyfile(folder / "0.png", folder / f"{i}.png")
    rows = [f"{i}.png,c{i},class{i % 7}" for i in range(count)]
    return "\n".join(["file,caption,label", *rows])


def test_the_split_parts_are_disjoint_complete_and_stable(folder):
    table = many(folder)
    everything = captions(open_folder(folder, table))
    train, held = (
        captions(open_folder(folder, split=split, holdout=0.3))
        for split in ("train", "eval")
    )
    assert set(train).isdisjoint(held)
    assert train | held == everything
    # 18 are expected, the standard deviation is 3.5.
    assert 5 < len(held) < 32
    assert captions(open_folder(folder, split="eval", holdout=0.3)) == held
    # By name: other rows of the table, and their order, change nothing.
    lines = table.splitlines()
    shorter = "\n".join([lines[0], *lines[:30:-1]])
    part = captions(open_folder(folder, shorter, split="eval", holdout=0.3))
    assert part == {k: v for k, v in held.items() if int(k.split(".")[0]) >= 30}


def test_the_split_is_the_same_in_every_process(folder):
    held = captions(open_folder(folder, many(folder), split="eval", holdout=0.3))
    code = (
        "import sys; from navit.sources.folder import *;"
        "s = FolderSource(config.Folder(sys.argv[1], split='eval', holdout=0.3));"
        "print(*[Path(s.name(i)).name for i in range(len(s))])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=SAMPLE.parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == list(held)


def test_a_larger_holdout_includes_the_smaller_one(folder):
    table = many(folder)
    small, large = (
        captions(open_folder(folder, table, split="eval", holdout=holdout))
        for holdout in (0.1, 0.5)
    )
    assert set(small) < set(large)


def test_the_parts_of_a_split_number_their_classes_alike(folder):
    # A head trained on one part is scored on the other by the number of the class.
    table = many(folder, 12)
    names = {
        open_folder(folder, table, split=split, holdout=0.3).tasks["label"].class_names
        for split in ("all", "train", "eval")
    }
    assert len(names) == 1


def test_an_unreadable_image_does_not_renumber_the_classes(folder):
    table = "file,caption,label\n0.png,x,a\n1.png,y,b\n2.png,z,c\n"
    before = open_folder(folder, table).tasks["label"]
    (folder / "1.png").write_bytes(b"not an image")
    after = open_folder(folder, table).tasks["label"]
    assert after.class_names == before.class_names
    np.testing.assert_array_equal(after.labels, before.labels[[0, 2]])


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "nowhere" in error_of(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"data\.train\.path"):
        FolderSource(Folder())


def test_a_folder_without_a_table_or_with_two_is_named(folder):
    assert str(folder) in error_of(folder)
    (folder / "a.csv").write_text("file,caption\n0.png,from a\n")
    (folder / "b.jsonl").write_text('{"file": "0.png", "caption": "from b"}\n')
    message = error_of(folder)
    assert str(folder) in message and "2" in message and "table" in message
    source = FolderSource(Folder(path=str(folder), table="b.jsonl"))
    assert captions(source) == {"0.png": ("from b",)}
    with pytest.raises(FileNotFoundError, match=r"c\.csv"):
        FolderSource(Folder(path=str(folder), table="c.csv"))


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val",
            "filename": f"{i}.png",
            "imgid": i,
            "split": split,
            "sentences": [{"raw": f"{word} {i}.", "tokens": [word]} for word in words],
        }
        for i, (split, words) in enumerate(
            [
                ("test", "one uno"),
                ("train", "two"),
                ("restval", "a b c d e f"),
                ("test", "three tre"),
                ("val", "four"),
            ]
        )
        for words in [words.split()]
    ],
}


def test_karpathys_json_is_a_table(folder):
    (folder / "val").mkdir()
    for i in range(6):
        (folder / f"{i}.png").rename(folder / f"val/{i}.png")
    table = json.dumps(KARPATHY)
    expected = {
        f"{i}.png": tuple(sentence["raw"] for sentence in image["sentences"])
        for i, image in enumerate(KARPATHY["images"])
    }
    for splits, images in (("#test", "03"), ("#train+restval", "12"), ("", "01234")):
        (folder / "d.json").write_text(table)
        source = FolderSource(Folder(str(folder), f"d.json{splits}"))
        assert captions(source) == {f"{i}.png": expected[f"{i}.png"] for i in images}
        assert read_image(source, 0) == (folder / f"val/{images[0]}.png").read_bytes()
    # Flickr30k's has no `filepath`.
    flat = json.loads(table)
    for image in flat["images"]:
        image["filename"] = f"val/{image['filename']}"
        del image["filepath"]
    (folder / "d.json").write_text(json.dumps(flat))
    assert captions(FolderSource(Folder(str(folder), "d.json"))) == expected
    # Splits of one file are other images, in training and in the evaluation.
    parts = [Folder(str(folder), f"d.json#{x}") for x in ("train+val", "test", "val")]
    assert not same_table(parts[0], parts[1])
    assert same_table(parts[0], parts[2])
    assert same_table(parts[1], Folder(str(folder), "d.json"))


@pytest.mark.parametrize(
    ("table", "splits", "words"),
    [
        ("{", "", ["d.json", "Expecting"]),
        ("[]", "", ["d.json has no list of images", "Karpathy", ".jsonl"]),
        ('{"images": {}}', "", ["no list of images"]),
        ('{"images": []}', "", ["lists no images"]),
        ('{"images": [{"filename": "0.png"}]}', "", ["image 1", "'sentences'"]),
        ('{"images": [5]}', "", ["image 1", "not 5"]),
        (json.dumps(KARPATHY), "#tset", ["no split 'tset'", "test (2)", "restval (1)"]),
        (json.dumps(KARPATHY), "#train", ["'val/1.png'", "1 of 1 files", "missing"]),
        (json.dumps(KARPATHY), "#", ["no split ''"]),
    ],
)
def test_a_bad_json_is_named_with_what_is_wrong(folder, table, splits, words):
    (folder / "d.json").write_text(table)
    with pytest.raises(ValueError) as caught:
        FolderSource(Folder(str(folder), f"d.json{splits}"))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_table_is_named_beside_those_that_are_there(folder):
    (folder / "d.json").write_text(json.dumps(KARPATHY))
    with pytest.raises(FileNotFoundError, match=r"/d\.jsn: the folder has .*d\.json"):
        FolderSource(Folder(str(folder), "d.jsn#test"))
    for file in folder.glob("*.csv"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"data.eval.table or eval.tasks.NAME"):
        FolderSource(Folder(str(folder)))


GOOD = "file,caption\n2.png,z\n"


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("t.csv", "", ["t.csv", "no images"]),
        ("t.csv", "file,caption\n", ["t.csv", "no images"]),
        ("t.csv", "file,caption\n0.png,x\ngone.png,y\n", ["t.csv", "gone.png"]),
        ("t.csv", "file,label\n0.png,dog\n1.png,\n", ["t.csv line 3", "caption"]),
        ("t.csv", "image,caption\n0.png,dog\n", ["t.csv", "file", "image"]),
        ("t.csv", "file,caption\n0.png,\n", ["t.csv line 2", "caption"]),
        ("t.csv", f"{GOOD}../x.png,y\n", ["t.csv line 3", "'../x.png' is outside"]),
        ("t.csv", f"{GOOD}a/../../x.png,y\n", ["line 3", "'a/../../x.png' is outside"]),
        ("t.csv", f"{GOOD}/etc/passwd,y\n", ["line 3", "'/etc/passwd' is outside"]),
        ("t.csv", 'file,caption\n"a\nb.png",y\n', ["t.csv", "a\\nb.png"]),
        # A quotation mark that is never closed: the record starts on line 3.
        ("t.csv", f'{GOOD}0.png,"' + "word\n" * 40_000, ["t.csv line 3", "quote"]),
        ("t.csv", f'{GOOD}0.png,"x\n1.png,y\n', ["t.csv line 3", "quote"]),
        ("t.csv", f'{GOOD}0.png,"x\n1.png,"y"\n', ["t.csv line 3", "quote"]),
        ("t.csv", GOOD + '0.png,"x' + "\n1.png,y" * 20 + '"\n', ["line 3", "21 lines"]),
        ("t.csv", f"{GOOD}0.png\n", ["t.csv line 3", "1 fields", "2 (file, caption)"]),
        ("t.csv", f"{GOOD}0.png,a, b\n", ["t.csv line 3", "3 fields", "quote"]),
        ("t.jsonl", '{"file": "0.png", "caption": "x"}\n{oops\n', ["t.jsonl", "2"]),
        ("t.jsonl", "\n" + "[" * 200_000 + "\n", ["t.jsonl", "2", "recursion"]),
        ("t.jsonl", "[1, 2]\n", ["t.jsonl", "1", "[1, 2]"]),
        ("t.jsonl", '{"file": 5, "caption": "x"}\n', ["t.jsonl", "1", "file"]),
        ("t.jsonl", '{"file": ["0.png"], "caption": "x"}\n', ["t.jsonl", "1", "file"]),
        ("t.jsonl", '{"file": "0.png", "caption": {"en": "x"}}\n', ["t.jsonl", "1"]),
        ("t.jsonl", '{"file": "0.png", "caption": [null]}\n', ["t.jsonl", "1"]),
    ],
)
def test_a_bad_table_is_named_with_what_is_wrong(folder, name, table, words):
    message = error_of(folder, table, name)
    for word in words:
        assert word in message


def test_a_table_in_another_encoding_is_named(folder):
    (folder / "t.csv").write_bytes("file,caption\n0.png,café\n".encode("latin-1"))
    assert "t.csv" in error_of(folder)


def test_a_set_of_unreadable_images_is_named(folder, caplog):
    for i in range(2):
        (folder / f"{i}.png").write_bytes(b"")
    message = error_of(folder, "file,caption\n0.png,x\n1.png,y\n", "t.csv")
    assert "t.csv" in message and "2" in message
    assert len(caplog.records) == 2


def test_a_split_that_holds_nothing_is_named(folder):
    message = error_of(folder, "file,caption\n0.png,x\n", split="eval", holdout=1e-9)
    assert "eval" in message and "1e-09" in message
