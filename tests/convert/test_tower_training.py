"""Training from other native-resolution towers, and back to their releases' layouts."""

import dataclasses

import jax
import numpy as np
import pytest

import navit
from navit.cli import main
from navit.config import Config, ModelConfig, TextConfig, override
from navit.config.towers import starting_from
from navit.convert.stored import build
from navit.weights import read
from tests.convert.test_convert import GOLDEN, assert_same, expected, tensors_of
from tests.convert.test_tower_files import plain

SMALL_TEXT = TextConfig(length=9, width=16, depth=1, mlp_dim=16, num_heads=2)


def test_a_text_tower_that_starts_at_random_is_not_frozen():
    weights = read(GOLDEN / "qwen2_vl")
    config = Config(init="a", init_towers=True)
    started = starting_from(config, weights.model, where="a")
    assert started.model.text == config.model.text and started.model.merger is None
    config = override(config, ["optim.text_lr=0"])
    with pytest.raises(ValueError, match="a has no text tower, so that of the run"):
        starting_from(config, weights.model, where="a")
    towers = ModelConfig(vision=weights.model.vision, text=SMALL_TEXT)
    one, other = (build(weights, towers, seed=seed) for seed in (0, 1))
    same = jax.tree.map(np.array_equal, one, other)
    assert all(jax.tree.leaves(same.vision)) and not all(jax.tree.leaves(same.text))


def test_embed_takes_the_towers_own_pixels(tmp_path):
    from PIL import Image

    image = expected("qwen2_vl")["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    out = tmp_path / "z.npz"
    command = ["embed", str(GOLDEN / "qwen2_vl"), str(tmp_path / "a.png")]
    assert main([*command, "--out", str(out)]) == 0
    model = navit.load(GOLDEN / "qwen2_vl")
    with np.load(out) as found:
        np.testing.assert_allclose(
            found["embeddings"], model.embed_images([image]), atol=1e-6
        )


SMALL = [
    "data.train.path=data/sample",
    "data.rows=4",
    "mesh.data=1",
    "data.budgets=16,36",
    "data.row_tokens=64",
    "eval.budgets=16",
    "optim.warmup_steps=0",
    "train.steps=1",
]


@pytest.mark.parametrize("name", ["kimi_vl", "qwen2_5_vl", "timm_par"])
def test_training_goes_on_with_a_text_tower_of_its_own(
    name, tmp_path, monkeypatch, caplog
):
    """And the tower, here a frozen one, is written as its release is."""
    monkeypatch.chdir(GOLDEN.parents[1])
    text = ["tokenizer=bytes", "vocab_size=258", "length=9", "width=16", "depth=1"]
    code = main(
        [
            "train",
            "configs/siglip2_naflex_finetune.py",
            f"init={GOLDEN / name}",
            *SMALL,
            *(f"model.text.{x}" for x in [*text, "mlp_dim=16", "num_heads=2"]),
            "optim.vision_lr=0",
            "optim.text_lr=1",
            "--workdir",
            str(tmp_path / "run"),
        ]
    )
    assert code == 0
    before, after = navit.load(GOLDEN / name).model, navit.load(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(before.vision), jax.tree.leaves(after.vision),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    assert after.embed_texts(["a cat"]).shape == (1, after.embed_dim)

    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "run"), str(out)]) == 0
    assert f"{out}: the text tower is left out" in caplog.text
    there = dataclasses.replace(read(GOLDEN / name).model, merger=None)
    assert read(out).model == there
    own = plain(tensors_of(GOLDEN / name))
    assert_same(plain(tensors_of(out)), {n: own[n] for n in own if not merges(n)})


def merges(name):
    return name.startswith(("merger.", "multi_modal_projector."))
