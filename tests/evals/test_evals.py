import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config

import navit
from navit.config import DataConfig, EvalConfig, Folder, override
from navit.embed import Embedder
from navit.embed_batches import check_budget
from navit.evals import budgets
from navit.evals.accuracy import Classification
from navit.evals.retrieval import Retrieval
from navit.evals.zero_shot import ZeroShot
from navit.input import memory
from navit.input.pipeline import open_eval_source
from navit.plan.epoch import grids_of
from navit.sources.source import Task

ROOT = Path(__file__).parents[2]
SAMPLE = Folder(str(ROOT / "data/sample"), table="captions.csv")

# Texts embed as fixed unit vectors.
VECTORS = {
    "a cat": (1, 0, 0),
    "photo of a cat": (0.8, 0.6, 0),
    "a dog": (0, 1, 0),
    "photo of a dog": (0, 0.6, 0.8),
    "a car": (0, 0, 1),
}


def embed(texts):
    return np.array([VECTORS[t] for t in texts], np.float32)


def test_zero_shot_counts_the_nearest_class_of_labelled_images():
    task = Task(("cat", "dog"), np.array([0, 1, 0, -1]))
    zero_shot = ZeroShot(embed, {"animal": task}, ("a {}",))
    images = np.array([[1, 0, 0], [0.9, 0.1, 0], [0.6, 0.5, 0], [0, 1, 0]])
    assert dict(zero_shot.run(images)) == {"animal_accuracy": pytest.approx(2 / 3)}
    assert zero_shot.chance == {"animal_accuracy": 0.5}


def test_zero_shot_averages_prompts():
    """ "a {}" alone takes this image for a dog; with the other prompt it is a cat."""
    task = Task(("cat", "dog"), np.array([0]))
    image = np.array([[0.5, 0.6, -0.6]])
    one = dict(ZeroShot(embed, {"t": task}, ("a {}",)).run(image))
    both = dict(ZeroShot(embed, {"t": task}, ("a {}", "photo of a {}")).run(image))
    assert one == {"t_accuracy": 0.0}
    assert both == {"t_accuracy": 1.0}


def test_images_that_could_not_be_read_do_not_count():
    task = Task(("cat", "dog"), np.array([0, 0, 1]))
    images = np.array([[1.0, 0, 0], [np.nan] * 3, [0, 1, 0]])
    zero_shot = ZeroShot(embed, {"t": task}, ("a {}",))
    assert dict(zero_shot.run(images)) == {"t_accuracy": 1.0}
    classify = Classification(lambda pooled: pooled, "t", task)
    assert dict(classify.run(images)) == {"t_accuracy": 1.0}
    retrieval = Retrieval(embed, [("a cat",), ("a car",), ("a dog",)])
    assert dict(retrieval.run(images)) == {
        "image_to_text_r1": 1.0,
        "text_to_image_r1": 1.0,
    }


def test_retrieval_counts_any_right_caption_and_any_right_image():
    captions = [("a cat", "photo of a cat"), ("a dog",), ("a dog", "a car")]
    retrieval = Retrieval(embed, captions)
    images = np.array([[0.8, 0.6, 0], [0, 0, 1], [0, 0.6, 0.8]])
    found = dict(retrieval.run(images))
    # Image 0 -> "photo of a cat", right; image 1 -> "a car", wrong; image 2 -> "a car".
    assert found["image_to_text_r1"] == pytest.approx(2 / 3)
    # Both cats -> image 0; "a dog" ties to image 0 (0.6) first, wrong; "a car" -> 1.
    assert found["text_to_image_r1"] == pytest.approx(2 / 4)
    # Right pairs among 3 images x 4 captions.
    assert retrieval.chance["image_to_text_r1"] == pytest.approx(5 / 12)


def test_classification_ignores_images_without_a_label():
    task = Task(("x", "y", "z"), np.array([0, 2, -1]))
    classify = Classification(lambda pooled: pooled, "kind", task)
    images = np.array([[3.0, 1, 2], [1, 5, 2], [0, 0, 1]])
    assert dict(classify.run(images)) == {"kind_accuracy": 0.5}
    assert classify.chance == {"kind_accuracy": pytest.approx(1 / 3)}


def test_table_and_plot_show_every_budget():
    results = {
        "step": 7,
        "images": 3,
        "chance": {"coarse_accuracy": 0.125, "image_to_text_r1": 0.01},
        "budgets": {
            "64": {"unreadable": 0, "coarse_accuracy": 0.5, "image_to_text_r1": 0.25},
            "1024": {"unreadable": 2, "coarse_accuracy": 1.0},
        },
    }
    lines = budgets.table(results).splitlines()
    assert lines[0] == "step 7, 3 images, 2 unreadable"
    assert [line.split()[0] for line in lines[1:]] == ["tokens", "64", "1024", "chance"]
    assert lines[2].split() == ["64", "50.0%", "25.0%"]
    assert lines[3].split() == ["1024", "100.0%", "-"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert budgets.plot(results).startswith(b"\x89PNG")


def evaluated(name, budget_list, **data):
    """A small model's results on the sample photographs, and their sizes."""
    model = navit.load(ROOT / "tests/golden" / name)
    config = dataclasses.replace(
        model.config,
        data=DataConfig(train=SAMPLE, eval=SAMPLE, **data),
        eval=EvalConfig(budgets=budget_list, max_images=5),
    )
    source = open_eval_source(config.data)
    budgets.check(config, source, source)
    embedder = Embedder(model.model, config, step=0)
    return budgets.evaluate(embedder, config, source), source.sizes[:5]


@pytest.mark.parametrize(
    ("images", "options", "tokens"),
    [
        (1, [], 256),
        (17, [], 3 * 8 * 256),  # batches of 2048 tokens on a CPU
        (99, [], 5 * 8 * 256),  # five of them at a time
        (17, ["data.max_upscale=1.0"], 4 * 256),  # 3 rows are one batch
        (17, ["eval.batch_tokens=1000000"], 32 * 256),
    ],
)
def test_a_budget_beyond_the_free_memory_is_refused(
    images, options, tokens, monkeypatch
):
    """Up to the last byte, it is not."""
    config = override(tiny_config(), options)
    needed = tokens * 768 + 4 * 256**2
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    check_budget(config, 256, images)
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"x 256 tokens .* GB, .*: lower the budget"):
        check_budget(config, 256, images)


def test_small_images_are_evaluated_at_the_plans_tokens():
    """`data.min_tokens` applies here too, and the table counts what was embedded."""
    data = dict(max_upscale=0.01, min_tokens=36)
    found, sizes = evaluated("siglip2_a", (49, 64), **data)
    for budget in (49, 64):
        grids = grids_of(sizes, budget, DataConfig(**data), 4)
        tokens = found["budgets"][str(budget)]["tokens_per_image"]
        assert tokens == round(float(grids.prod(-1).mean()), 1) > 30


def test_a_model_of_one_resolution_is_evaluated_once(caplog):
    caplog.set_level("INFO", "navit")
    found, _ = evaluated("siglip_fixed", (16, 64, 256))
    assert list(found["budgets"]) == ["25"]
    assert found["budgets"]["25"]["tokens_per_image"] == 25
    assert "25 tokens: it is evaluated once, not at" in caplog.text
    assert "eval.budgets=16,64,256" in caplog.text
