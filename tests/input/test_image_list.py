"""navit.input.image_list: what `navit embed` takes as images."""

import io
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from navit.config import Folder
from navit.input.image_list import images_of
from navit.sources.folder import FolderSource

FILES = ["0.png", "1.PNG", "below/2.png", "below/deep/3.png"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four images in folders, with a table and other files."""
    root = tmp_path / "photos"
    for i, name in enumerate(FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(root / name, "PNG")
    (root / "notes.txt").write_text("no image")
    (root / "t.csv").write_text("file\n1.PNG\nbelow/../0.png\n0.png\n")
    return root


def contents(images) -> list[bytes]:
    found = []
    for image in images:
        with image.open() as file:
            found.append(file.read())
    return found


def test_files_folders_tables_and_a_list_come_in_the_order_given(photos):
    path = str(photos)
    lines = [f"{path}/below/2.png\n", "\n", f"{path}/t.csv\r\n"]
    arguments = [f"{path}/1.PNG", path, "-", f"{path}/t.csv"]
    table = ["1.PNG", "0.png"]
    expected = ["1.PNG", *FILES, "below/2.png", *table, *table]
    images = images_of(arguments, lines)
    assert [image.name for image in images] == [f"{path}/{x}" for x in expected]
    assert contents(images) == [(photos / x).read_bytes() for x in expected]


def test_the_suffix_of_a_table_may_be_in_capitals(photos):
    (photos / "t.csv").rename(photos / "T.CSV")
    images = images_of([f"{photos}/T.CSV"])
    assert [x.name for x in images] == [f"{photos}/1.PNG", f"{photos}/0.png"]
    (photos / "T.CSV").write_text("file,caption\n0.png,x\n")
    for table in ("", "T.CSV"):
        source = FolderSource(Folder(str(photos), table=table))
        assert source.record(0).captions == ("x",)


def test_a_table_in_this_folder_needs_no_folder(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert [image.name for image in images_of(["t.csv", "."])] == [
        *["1.PNG", "0.png"],
        *FILES,
    ]


def test_tars_are_named_by_tar_and_key(photos, tmp_path):
    for number, name in enumerate(FILES):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(photos / name, Path(name).name)
    images = images_of([f"{tmp_path}/{{1..2}}.tar", f"{tmp_path}/0.tar"])
    assert [image.name for image in images] == [
        f"{tmp_path}/{i}.tar: {i}" for i in (1, 2, 0)
    ]
    assert contents(images) == [(photos / FILES[i]).read_bytes() for i in (1, 2, 0)]


def test_a_url_is_read_as_the_folder_is(photos):
    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/embed/photos", recursive=True)
    url = "memory://embed/photos"
    images = images_of([url, f"{url}/t.csv", f"{url}/0.png"])
    expected = [*FILES, "1.PNG", "0.png", "0.png"]
    assert [image.name for image in images] == [f"{url}/{x}" for x in expected]
    assert contents(images) == [(photos / x).read_bytes() for x in expected]
    memory.rm("/embed", recursive=True)


def test_a_path_without_an_image_is_named(photos, tmp_path):
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no image"):
        images_of([f"{photos}/empty"])
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.jpg"):
        images_of([str(photos), f"{photos}/gone.jpg"])
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.tar"):
        images_of([f"{photos}/gone.tar"])
    (gone,) = images_of([f"{photos}/gone.jpg"], must_exist=False)
    with pytest.raises(FileNotFoundError):
        gone.open()
    os.mkfifo(tmp_path / "pipe.jpg")
    (pipe,) = images_of([str(tmp_path / "pipe.jpg")])
    with pytest.raises(OSError, match="not a regular file"):
        pipe.open()
    assert images_of(["-"], io.StringIO("\n")) == []
