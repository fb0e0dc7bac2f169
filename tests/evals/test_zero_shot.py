"""Zero-shot classification equals a plain one, and embeds each text once."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import chances, values

from navit.evals.accuracy import Classification, ranks
from navit.evals.calibration import calibration_error
from navit.evals.prompts import load_templates
from navit.evals.zero_shot import class_vectors, zero_shot
from navit.sources.source import Task

PROMPTS = load_templates(str(Path(__file__).parents[2] / "data/prompts/photos.txt"))
NAMES = tuple(f"class {i}" for i in range(9))


def embed(texts):
    """A fixed unit vector for each text."""
    seeds = (zlib.crc32(text.encode()) for text in texts)
    x = [np.random.default_rng(seed).standard_normal(12) for seed in seeds]
    return np.array([v / np.linalg.norm(v) for v in x], np.float32)


def logits(images, classes):
    return 10 * images @ classes.T - 3


def plain_scores(images):
    scores = np.zeros((len(images), len(NAMES)))
    for c, name in enumerate(NAMES):
        mean = sum(embed([prompt.format(name)])[0] for prompt in PROMPTS) / len(PROMPTS)
        scores[:, c] = images @ (mean / np.sqrt((mean**2).sum()))
    return scores


@pytest.fixture
def images(rng):
    x = rng.standard_normal((60, 12)).astype(np.float32)
    x[[4, 9]] = np.nan
    return x


@pytest.fixture
def task(rng):
    return Task(NAMES, rng.integers(-1, 8, 70).astype(np.int32))  # none is of class 8


def test_it_equals_a_plain_one(images, task):
    evaluator = zero_shot(embed, logits, task, PROMPTS)
    scores = plain_scores(images)
    counted = [i for i in range(60) if task.labels[i] >= 0 and i not in (4, 9)]
    order = {i: list(np.argsort(-scores[i])) for i in counted}
    hits = {i: order[i][0] == task.labels[i] for i in counted}
    top5 = [task.labels[i] in order[i][:5] for i in counted]
    e = np.exp(10 * scores[counted] - 3)
    probabilities = e / e.sum(1, keepdims=True)
    labels = task.labels[counted]
    expected = {
        "accuracy": np.mean(list(hits.values())),
        "top5": np.mean(top5),
        "calibration_error": calibration_error(probabilities, labels),
    }
    assert values(evaluator.run(images)) == pytest.approx(expected, abs=1e-5)
    found = evaluator.confidences(images)
    assert found.places.tolist() == counted and (found.labels == labels).all()
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-5)
    assert chances(evaluator.run(images)) == pytest.approx(
        {"accuracy": 1 / 9, "top5": 5 / 9}
    )
    own = {c: [hits[i] for i in counted if task.labels[i] == c] for c in range(9)}
    assert evaluator.per_class(images) == {
        NAMES[c]: (pytest.approx(np.mean(some)), len(some))
        for c, some in own.items()
        if some
    }
    assert {metric.of for metric in evaluator.run(images)} == {len(counted)}


def test_the_classifier_is_built_once_for_all_budgets(images, task):
    calls = []

    def counting(texts):
        calls.append(len(texts))
        return embed(texts)

    evaluator = zero_shot(counting, logits, task, PROMPTS)
    for budget in range(3):
        values(evaluator.run(images + budget))
        evaluator.per_class(images)
    assert calls == [len(NAMES) * len(PROMPTS)]


def test_class_vectors_have_unit_norm_and_ignore_the_order_of_prompts():
    vectors = class_vectors(embed, NAMES, PROMPTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    turned = class_vectors(embed, NAMES, PROMPTS[::-1])
    np.testing.assert_allclose(turned, vectors, atol=1e-6)


def test_top_5_needs_more_than_5_classes(images):
    task = Task(NAMES[:5], np.zeros(60, np.int32))
    evaluator = zero_shot(embed, logits, task)
    assert set(chances(evaluator.run(images))) == {"accuracy"}
    assert set(values(evaluator.run(images))) == {"accuracy", "calibration_error"}


def test_ranks_are_places_in_a_stable_sort(rng):
    scores = rng.integers(0, 4, (50, 7))
    labels = rng.integers(0, 7, 50)
    order = np.argsort(-scores, axis=1, kind="stable")
    places = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
    assert ranks(scores, labels).tolist() == places
    assert ((ranks(scores, labels) == 0) == (scores.argmax(1) == labels)).all()


def test_class_logits_have_a_top_5_too(rng):
    logits, labels = rng.standard_normal((30, 9)), rng.integers(0, 9, 30)
    classify = Classification(lambda pooled: pooled, Task(NAMES, labels))
    places = [
        list(row).index(x) for row, x in zip((-logits).argsort(1), labels, strict=True)
    ]
    found = values(classify.run(logits))
    del found["calibration_error"]
    assert found == pytest.approx(
        {
            "accuracy": np.mean([x == 0 for x in places]),
            "top5": np.mean([x < 5 for x in places]),
        }
    )


def test_a_label_beyond_the_class_names_is_an_error():
    task = Task(NAMES, np.array([0, 9]))
    with pytest.raises(ValueError, match=r"9 class names .* the label 9.*10 names"):
        zero_shot(embed, logits, task)
