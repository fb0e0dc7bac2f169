"""Training on from released weights: sizes, freezing, tokenizers."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

import navit
from navit.cli import main
from navit.config import Config, ModelConfig, override
from navit.embed import Embedder
from navit.input import text
from navit.input.synthetic import SyntheticSource
from navit.model.two_tower import TwoTower
from navit.train.checks import check_before
from navit.weights import read, starting_from

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


def config_of(*overrides: str) -> Config:
    """`tiny_config` with the towers left to the weights."""
    config = dataclasses.replace(tiny_config(), model=ModelConfig())
    return override(config, overrides)


def test_sizes_come_from_the_weights():
    weights = read(GOLDEN / "siglip2_b")
    config = starting_from(config_of("model.remat=dots"), weights)
    assert config.model.vision.width == 30 and config.model.text.length == 9
    assert config.model.remat == "dots"
    with pytest.raises(ValueError, match=r"model.vision.pool: 'map' -> 'mean'"):
        named = [f"model.vision.{k}={v}" for k, v in SIZES.items()]
        starting_from(config_of(*named, "model.vision.pool=mean"), weights)


SIZES = dict(patch_size=3, width=30, depth=3, mlp_dim=53, num_heads=3)
SIZES |= {"position.size": 7}


def test_one_resolution_goes_on_with_the_aspect_kept(caplog):
    caplog.set_level("INFO", "navit")
    config = starting_from(config_of(), read(GOLDEN / "siglip_fixed"))
    assert not config.model.vision.fixed_grid
    assert "one size, 5x5 patches; from here on images keep their aspect" in caplog.text


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_training_on_moves_what_is_not_frozen(frozen, tmp_path, monkeypatch):
    """Through the command: step 0 is the file's weights; a frozen tower stays."""
    monkeypatch.chdir(ROOT)
    before = navit.load(GOLDEN / "siglip2_b").model
    code = main(
        [
            *("train", "configs/siglip2_naflex_finetune.py"),
            *("--workdir", str(tmp_path), f"init={GOLDEN / 'siglip2_b'}"),
            *("data.train.path=data/sample", "data.rows=2", "mesh.data=1"),
            *("data.budgets=16,36", "data.row_tokens=64", "eval.budgets=16"),
            *("train.steps=2", "optim.warmup_steps=0", "optim.lr=0.01"),
            *("optim.text_lr=1", f"optim.{frozen}_lr=0"),
        ]
    )
    assert code == 0
    after = navit.load(tmp_path).model
    for tower in ("vision", "text"):
        pairs = zip(
            jax.tree.leaves(getattr(before, tower)),
            jax.tree.leaves(getattr(after, tower)),
            strict=True,
        )
        same = [np.array_equal(a, b) for a, b in pairs]
        assert all(same) if tower == frozen else not any(same)
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_work_directory_keeps_its_tokenizer(tmp_path):
    folder = shutil.copytree(GOLDEN / "siglip2_b", tmp_path / "hf")
    workdir = tmp_path / "run"
    assert main(["convert", str(folder), str(workdir), "--format", "navit"]) == 0
    before = navit.load(workdir).embed_texts(["a cat"])
    shutil.rmtree(folder)
    np.testing.assert_array_equal(navit.load(workdir).embed_texts(["a cat"]), before)
    (workdir / "tokenizer.json").unlink()
    text.open_tokenizer.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*model.text.tokenizer"):
        navit.load(workdir).embed_texts(["a cat"])


def test_a_tokenizer_with_more_ids_than_the_table_is_refused():
    """Where it would read another token's vector, or none."""
    named = f"model.text.tokenizer={GOLDEN / 'gemma/gemma.model'}"
    for vocab_size, refused in ((40, False), (39, True)):
        config = override(tiny_config(), [named, f"model.text.vocab_size={vocab_size}"])
        model = TwoTower(config.model, rngs=nnx.Rngs(0))
        message = r"gemma.model has 40 ids, .* model.text.vocab_size=39"
        error = pytest.raises(ValueError, match=message)
        with error if refused else contextlib.nullcontext():
            check_before(config, SyntheticSource(5))
        with error if refused else contextlib.nullcontext():
            found = Embedder(model, config, step=0).embed_texts(["a cat"])
            assert found.shape == (1, 16)


def test_a_frozen_tower_needs_weights_to_start_from(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    command = ["train", "configs/siglip2_naflex_finetune.py", "--workdir"]
    assert main([*command, str(tmp_path), "data.train.path=data/sample"]) == 1
    assert "optim.text_lr=0 freezes a tower" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_named_tokenizer_leaves_the_sizes_to_the_weights():
    weights = read(GOLDEN / "siglip2_b")
    config = config_of("model.text.tokenizer=other.model")
    text = starting_from(config, weights).model.text
    assert text.tokenizer == "other.model" and text.length == 9
