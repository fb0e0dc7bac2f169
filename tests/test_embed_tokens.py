"""`navit embed --tokens` and `--merged`: an array for each image, in one file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import navit
from navit import strategies
from navit.cli import main

GOLDEN = Path(__file__).parent / "golden"
NAME = "qwen2_vl"


@pytest.fixture(scope="module")
def model():
    return navit.load(GOLDEN / NAME)


@pytest.fixture
def files(rng, tmp_path):
    """One image as long as a row, and four in the next; the first of them is cut."""
    files = []
    for i, size in enumerate([(40, 40), (24, 24), (8, 30), (40, 8), (16, 16)]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(files[-1])
    files[1].write_bytes(files[1].read_bytes()[:300])
    return files


def embed(*args):
    return main(["embed", str(GOLDEN / NAME), *map(str, args)])


def test_each_image_has_its_own_array(model, files, tmp_path):
    """An unreadable image does not move its neighbours' tokens."""
    out = tmp_path / "z.npz"
    assert embed(*files, "--merged", "--skip-unreadable", "--out", out) == 0
    whole = [files[0], *files[2:]]
    expected = list(model.features(whole, merged=True))
    with np.load(out, allow_pickle=False) as found:
        assert found["names"].tolist() == [str(name) for name in whole]
        assert sorted(found.files) == ["0", "1", "2", "3", "names"]
        for i, tokens in enumerate(expected):
            assert found[f"{i}"].dtype == np.float32
            np.testing.assert_allclose(found[f"{i}"], tokens, atol=1e-5)


def test_views_have_arrays_of_their_own(model, files, tmp_path):
    out, whole = tmp_path / "z.npz", [files[0], *files[2:]]
    strategy = "internvl:tile=16,max_tiles=4,patch=4"
    assert embed(*whole, "--tokens", "--strategy", strategy, "--out", out) == 0
    rule = strategies.InternVL(16, max_tiles=4, patch=4)
    several = False
    with np.load(out) as found:
        for i, views in enumerate(model.features(whole, strategy=rule)):
            several |= len(views) > 1
            for k, view in enumerate(views):
                np.testing.assert_allclose(found[f"{i}/{k}"], view.tokens, atol=1e-5)
            assert f"{i}/{len(views)}" not in found.files
    assert several


def test_what_cannot_be_written_is_one_line(files, tmp_path, capsys):
    out = tmp_path / "z.npz"
    assert embed(*files, "--merged", "--out", out) == 1
    said = capsys.readouterr().err
    assert "1.png" in said and "--skip-unreadable leaves it out" in said
    other = ["embed", str(GOLDEN / "siglip2_a"), str(files[0]), "--merged"]
    assert main([*other, "--out", str(out)]) == 1
    assert "this model has no merger" in capsys.readouterr().err
    assert not out.exists() and sorted(tmp_path.iterdir()) == sorted(files)
