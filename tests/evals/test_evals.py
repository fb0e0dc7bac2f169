import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import chances, tiny_config, values

import navit
from navit.config import DataConfig, EvalConfig, Folder, override
from navit.embed import Embedder
from navit.embed_batches import check_budget
from navit.evals import budgets
from navit.evals.accuracy import Classification
from navit.evals.retrieval import Retrieval
from navit.evals.tasks import open_tasks
from navit.evals.zero_shot import zero_shot
from navit.input import memory
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


def logits(images, classes):
    return images @ classes.T


def test_zero_shot_counts_the_nearest_class_of_labelled_images():
    task = Task(("cat", "dog"), np.array([0, 1, 0, -1]))
    evaluator = zero_shot(embed, logits, task, ("a {}",))
    images = np.array([[1, 0, 0], [0.9, 0.1, 0], [0.6, 0.5, 0], [0, 1, 0]])
    assert values(evaluator.run(images))["accuracy"] == pytest.approx(2 / 3)
    assert chances(evaluator.run(images)) == {"accuracy": 0.5}


def test_zero_shot_averages_prompts():
    """ "a {}" alone takes this image for a dog; with the other prompt it is a cat."""
    task = Task(("cat", "dog"), np.array([0]))
    image = np.array([[0.5, 0.6, -0.6]])
    for prompts, accuracy in ((("a {}",), 0), (("a {}", "photo of a {}"), 1)):
        evaluator = zero_shot(embed, logits, task, prompts)
        assert values(evaluator.run(image))["accuracy"] == accuracy


def test_images_that_could_not_be_read_do_not_count():
    task = Task(("cat", "dog"), np.array([0, 0, 1]))
    images = np.array([[1.0, 0, 0], [np.nan] * 3, [0, 1, 0]])
    evaluator = zero_shot(embed, logits, task, ("a {}",))
    assert values(evaluator.run(images))["accuracy"] == 1.0
    classify = Classification(lambda pooled: pooled, task)
    assert values(classify.run(images))["accuracy"] == 1.0
    retrieval = Retrieval(embed, [("a cat",), ("a car",), ("a dog",)])
    assert values(retrieval.run(images)) == {
        "image_to_text_r1": 1.0,
        "text_to_image_r1": 1.0,
    }


def test_retrieval_counts_any_right_caption_and_any_right_image():
    captions = [("a cat", "photo of a cat"), ("a dog",), ("a dog", "a car")]
    retrieval = Retrieval(embed, captions)
    images = np.array([[0.8, 0.6, 0], [0, 0, 1], [0, 0.6, 0.8]])
    found = values(retrieval.run(images))
    # Image 0 -> "photo of a cat", right; image 1 -> "a car", wrong; image 2 -> "a car".
    assert found["image_to_text_r1"] == pytest.approx(2 / 3)
    # Both cats -> image 0; "a dog" ties to image 0 (0.6) first, wrong; "a car" -> 1.
    assert found["text_to_image_r1"] == pytest.approx(2 / 4)
    # Right pairs among 3 images x 4 captions.
    assert chances(retrieval.run(images))["image_to_text_r1"] == pytest.approx(5 / 12)


def test_classification_ignores_images_without_a_label():
    task = Task(("x", "y", "z"), np.array([0, 2, -1]))
    classify = Classification(lambda pooled: pooled, task)
    images = np.array([[3.0, 1, 2], [1, 5, 2], [0, 0, 1]])
    assert values(classify.run(images))["accuracy"] == 0.5
    assert chances(classify.run(images)) == {"accuracy": pytest.approx(1 / 3)}


def evaluated(name, budget_list, **data):
    """A small model's results on the sample photographs, and their sizes."""
    model = navit.load(ROOT / "tests/golden" / name)
    config = dataclasses.replace(
        model.config,
        data=DataConfig(train=SAMPLE, eval=SAMPLE, **data),
        eval=EvalConfig(budgets=budget_list, max_images=5),
    )
    opened = open_tasks(config)
    budgets.check(config, opened)
    embedder = Embedder(model.model, config, step=0)
    found = budgets.evaluate(embedder, config, opened)
    return found.rows, opened[0].images.source.sizes[:5]


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
        rows = [row for row in found if row["budget"] == budget]
        assert {row["tokens_per_image"] for row in rows} == {
            round(float(grids.prod(-1).mean()), 1)
        }
        assert rows[0]["tokens_per_image"] > 30


def test_a_model_of_one_resolution_is_evaluated_once(caplog):
    caplog.set_level("INFO", "navit")
    found, _ = evaluated("siglip_fixed", (16, 64, 256))
    assert {(row["budget"], row["tokens_per_image"]) for row in found} == {(25, 25)}
    for row in found:
        assert any("one fixed resolution" in note for note in row["notes"])
    assert "25 tokens, so it is evaluated once, not at each of" in caplog.text
    assert "eval.budgets=16,64,256" in caplog.text
