"""Training from released weights: sizes, freezing, tokenizers."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import tiny_config

import navit
from navit.cli import main
from navit.config import (
    Classification,
    Config,
    ModelConfig,
    TrainConfig,
    override,
)
from navit.config.towers import starting_from
from navit.convert.stored import Weights, build
from navit.embed import Embedder
from navit.input import tokens
from navit.model.two_tower import TwoTower
from navit.train.checks import check_config
from navit.weights import read

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = Path(__file__).parents[2]


def starting(weights: Weights, *overrides: str) -> Config:
    """A config of other towers, which `init_towers` replaces by those of `weights`."""
    config = override(tiny_config(), ["init=a", "init_towers=true", *overrides])
    return starting_from(
        config, weights.model, where=weights.where, overrides=overrides
    )


def test_towers_come_from_the_weights_where_the_config_says_so():
    weights = read(GOLDEN / "siglip2_b")
    config = starting(weights, "model.remat=dots")
    assert config.model.vision == weights.model.vision
    assert config.model.text == weights.model.text
    assert config.model.remat == "dots"
    message = r"\(model.vision.patch_size: 3 -> 16\): leave model.vision"
    with pytest.raises(ValueError, match=message):
        starting(weights, "model.vision.patch_size=16")


def test_towers_that_the_weights_do_not_have_are_refused_by_name():
    """Even where they are the config's defaults, as for B/32 under B/16."""
    config = Config(init="b")
    assert starting_from(config, config.model, where="b16") == config
    b32 = override(config.model, ["vision.patch_size=32"])
    message = r"\(model.vision.patch_size: 32 -> 16\): init_towers=true takes"
    with pytest.raises(ValueError, match=message):
        starting_from(config, b32, where="b32")


@pytest.mark.parametrize("init_towers", [True, False])
def test_the_image_tower_is_taken_alone(init_towers):
    vision = dataclasses.replace(tiny_config().model.vision, num_classes=2)
    config = override(tiny_config(), ["init=a", f"init_towers={init_towers}"])
    trained = dataclasses.replace(config.model, vision=vision)
    config = dataclasses.replace(
        config,
        model=ModelConfig(vision=vision, text=None),
        train=TrainConfig(losses=(Classification(),)),
    )
    assert starting_from(config, trained, where="a") == config


def test_training_from_one_resolution_keeps_the_aspect(caplog):
    caplog.set_level("INFO", "navit")
    config = starting(read(GOLDEN / "siglip_fixed"))
    assert not config.model.vision.fixed_grid
    assert "one size, 5x5 patches; from here on images keep their aspect" in caplog.text


SMALL = [
    "data.train.path=data/sample",
    "data.rows=4",
    "mesh.data=1",
    "data.budgets=16,36",
    "data.row_tokens=64",
    "eval.budgets=16",
    "optim.warmup_steps=0",
    "train.steps=2",
    "optim.lr=0.01",
    "optim.text_lr=1",
]


@pytest.mark.parametrize("frozen", ["vision", "text"])
def test_only_towers_that_are_not_frozen_train(frozen, tmp_path, monkeypatch):
    """Through the command: step 0 is the file's weights; a frozen tower stays."""
    monkeypatch.chdir(ROOT)
    before = navit.load(GOLDEN / "siglip2_b").model
    code = main(
        [
            "train",
            "configs/siglip2_naflex_finetune.py",
            f"init={GOLDEN / 'siglip2_b'}",
            *SMALL,
            f"optim.{frozen}_lr=0",
            "--workdir",
            str(tmp_path),
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


def test_a_run_resumes_without_its_initial_weights(
    tmp_path, monkeypatch, caplog, capsys
):
    """A frozen tower's state is restored, and the file is not read again."""
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO", "navit")
    folder = shutil.copytree(GOLDEN / "siglip2_b", tmp_path / "hf")
    command = [
        "train",
        "configs/siglip2_naflex_finetune.py",
        f"init={folder}",
        *SMALL,
        "optim.text_lr=0",
        "--workdir",
        str(tmp_path / "run"),
    ]
    assert main(command) == 0
    shutil.rmtree(folder)
    tokens.open_tokenizer.cache_clear()
    assert main(command) == 0
    assert "is already trained to step 2" in caplog.text
    assert main([*command, "model.vision.patch_size=16"]) == 1
    assert "(model.vision.patch_size: 3 -> 16)" in capsys.readouterr().err
    fresh = [*command, "--workdir", str(tmp_path / "other")]
    assert main(fresh) == 1


def test_settings_that_the_weights_were_not_trained_with_are_refused():
    for setting in ("width=60", "pool=mean", "position.kind=learned_2d"):
        with pytest.raises(
            ValueError, match=r"siglip2_b was trained otherwise \(model"
        ):
            navit.load(GOLDEN / "siglip2_b", overrides=[f"model.vision.{setting}"])
    for setting in ("model.text.depth=2", "model.text.length=8"):
        with pytest.raises(ValueError, match=setting.split("=")[0]):
            read(GOLDEN / "siglip2_b", overrides=[setting])


def test_settings_of_the_computation_are_free_to_choose():
    options = ["model.fused=false", "model.dtype=bfloat16", "model.remat=full"]
    model = navit.load(GOLDEN / "siglip2_b", overrides=options)
    assert not model.config.model.fused


def test_an_evaluation_of_released_weights_needs_out(tmp_path, capsys):
    """Checked before the model is read: the file is not a model."""
    file = tmp_path / "a.npz"
    file.write_text("")
    assert main(["eval", str(file)]) == 1
    assert "a.npz is not a work directory to write to" in capsys.readouterr().err
    assert main(["eval", "configs/quickstart.py"]) == 1
    assert "is a config: name the work directory" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "b")]) == 1
    assert f"{tmp_path / 'b'} does not exist" in capsys.readouterr().err
    assert file.read_text() == ""


def test_every_command_takes_settings_that_a_file_lacks(tmp_path, caplog):
    """Such as images of 23 pixels a side, which an .npz cannot record."""
    caplog.set_level("INFO", "navit")
    golden, file = GOLDEN / "siglip_cut", tmp_path / "a.npz"
    size = "model.vision.image_size=23"
    assert main(["convert", str(golden), str(file)]) == 0
    said = "a.npz: assuming images of 20 pixels a side; model.vision.image_size=..."
    assert said not in caplog.text
    assert main(["convert", str(file), str(tmp_path / "hf"), size]) == 0
    assert said not in caplog.text
    assert read(tmp_path / "hf").model.vision.image_size == 23
    image = str(ROOT / "data/sample/cat.jpg")
    found = []
    for weights, options in (
        (golden, []),
        (file, ["--set", size]),
        (file, []),
    ):
        out = tmp_path / "out" / "z.npz"
        command = ["embed", str(weights), image, "--out", str(out), *options]
        assert main(command) == 0
        with np.load(out) as z:
            found.append(z["embeddings"])
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    assert caplog.text.count(said) == 1
    assert main(["embed", str(golden), image, "--out", str(tmp_path)]) == 1


def test_a_tokenizer_that_is_named_is_written(tmp_path):
    named = f"model.text.tokenizer={GOLDEN / 'siglip_cut/spiece.model'}"
    command = ["convert", str(GOLDEN / "siglip2_b"), str(tmp_path / "a"), named]
    assert main(command) == 0
    assert (tmp_path / "a/spiece.model").is_file()


def test_errors_explain_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist$"):
        navit.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"hf download org/name --local-dir n"):
        navit.load("org/name")
    file = GOLDEN / "siglip2_b/model.safetensors"
    with pytest.raises(ValueError, match=r"name the directory, .*siglip2_b$"):
        navit.load(file)
    np.savez(tmp_path / "z.npz", names=np.array(["a"]), embeddings=np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"z.npz holds embeddings .*, not a model"):
        navit.load(tmp_path / "z.npz")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weights = read(GOLDEN / "siglip2_b")

    def broken(name):
        found = weights.read(name).copy()
        if name == "text.position":
            found[3, 2] = value
        return found

    with pytest.raises(
        ValueError, match=r"siglip2_b: 1 of the 189 .*text.position are"
    ):
        build(dataclasses.replace(weights, get=broken), weights.model)


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_weights_that_are_not_finite_are_not_converted(name, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN / "siglip2_b", tmp_path / "hf")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["logit_bias"] = np.array([np.inf], np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert main(["convert", str(folder), str(tmp_path / name)]) == 1
    assert "1 of the 1 values of bias are NaN or inf" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["hf", "a.npz"])
def test_a_model_of_bytes_keeps_its_texts(name, tmp_path):
    config = tiny_config()
    model = Embedder(TwoTower(config.model, rngs=nnx.Rngs(0)), config, step=0)
    navit.save(model, tmp_path / name)
    back = navit.load(tmp_path / name)
    texts = ["a Cat", "", "naïve 🐈", "ΟΔΟΣ İ", "<eos> <0x41>\0", "\ud83d", "x" * 99]
    found, expected = (
        tokens.encode(texts, 24, x.config.model.text.tokenizer) for x in (back, model)
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(back.embed_texts(texts), model.embed_texts(texts))


def test_a_work_directory_keeps_its_tokenizer(tmp_path):
    folder = shutil.copytree(GOLDEN / "siglip2_b", tmp_path / "hf")
    workdir = tmp_path / "run"
    assert main(["convert", str(folder), str(workdir), "--format", "navit"]) == 0
    before = navit.load(workdir).embed_texts(["a cat"])
    shutil.rmtree(folder)
    np.testing.assert_array_equal(navit.load(workdir).embed_texts(["a cat"]), before)
    (workdir / "tokenizer.json").unlink()
    tokens.open_tokenizer.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*model.text.tokenizer"):
        navit.load(workdir).embed_texts(["a cat"])


def test_a_tokenizer_with_more_ids_than_the_table_is_refused():
    """It would read another token's vector, or none."""
    named = f"model.text.tokenizer={GOLDEN / 'gemma/gemma.model'}"
    for vocab_size, refused in ((40, False), (39, True)):
        config = override(tiny_config(), [named, f"model.text.vocab_size={vocab_size}"])
        model = TwoTower(config.model, rngs=nnx.Rngs(0))
        message = r"gemma.model has 40 ids, .* model.text.vocab_size=39"
        error = pytest.raises(ValueError, match=message)
        with error if refused else contextlib.nullcontext():
            check_config(config)
        with error if refused else contextlib.nullcontext():
            found = Embedder(model, config, step=0).embed_texts(["a cat"])
            assert found.shape == (1, 16)


def test_a_frozen_tower_needs_weights_to_start_from(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    command = ["train", "configs/siglip2_naflex_finetune.py", "--workdir"]
    command += [str(tmp_path), "data.train.path=data/sample"]
    assert main(command) == 1
    assert "init_towers=true takes the towers of" in capsys.readouterr().err
    assert main([*command, "init_towers=false"]) == 1
    assert "optim.text_lr=0 freezes a tower" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_is_of_the_towers_that_a_run_has(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    printed = []
    for setting in (
        f"init={GOLDEN / 'siglip2_b'}",
        "model.vision.patch_size=3",
        "model.vision.patch_size=16",
    ):
        command = ["plan", "configs/siglip2_naflex_finetune.py", setting]
        command += ["data.train.path=data/sample", "data.max_upscale=1"]
        assert main(command) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_a_named_tokenizer_leaves_the_sizes_to_the_weights():
    weights = read(GOLDEN / "siglip2_b")
    text = starting(weights, "model.text.tokenizer=other.model").model.text
    assert text.tokenizer == "other.model" and text.length == 9
