import numpy as np
import pytest

from navit.evals import budgets
from navit.evals.classification import Classification
from navit.evals.retrieval import Retrieval
from navit.evals.zero_shot import ZeroShot
from navit.input.sources import Task

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
