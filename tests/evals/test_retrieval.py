"""Retrieval equals a plain one on the whole matrix of scores."""

import itertools

import jax
import numpy as np
import pytest
from helpers import chances, values

from navit.config import MeshConfig
from navit.evals.nearest import nearest
from navit.evals.retrieval import Retrieval, chance, recall
from navit.sharding import make_mesh, use_mesh


def integers(rng, count, width=4):
    """Vectors whose products are exact in float32 and often equal, some of them 0."""
    return rng.integers(-2, 3, (count, width)).astype(np.float32)


def plain_nearest(queries, candidates, k):
    scores = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def plain_recalls(images, texts, captions):
    """Both ways, with a set of right answers for each query."""
    readable = [i for i in range(len(images)) if not np.isnan(images[i, 0])]
    asked = sorted({c for i in readable for c in captions[i]})
    found = {}
    for name, queries, candidates, is_right in (
        ("image_to_text", readable, asked, lambda i, c: c in captions[i]),
        ("text_to_image", asked, readable, lambda c, i: c in captions[i]),
    ):
        vectors = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
        q, c = vectors[name]
        _, order = plain_nearest(q[queries], c[candidates], len(candidates))
        for k in (1, 5, 10):
            hits = [
                any(is_right(query, candidates[place]) for place in row[:k])
                for query, row in zip(queries, order, strict=True)
                if any(is_right(query, candidate) for candidate in candidates)
            ]
            if k == 1 or k < len(candidates):
                found[f"{name}_r{k}"] = pytest.approx(np.mean(hits))
    return found


@pytest.mark.parametrize("devices", [1, 8])
def test_nearest_equals_a_stable_sort_in_any_blocks(devices, rng):
    queries, candidates = integers(rng, 37), integers(rng, 50)
    candidates[30:40] = candidates[:10]
    mesh, _ = make_mesh(MeshConfig(data=devices, fsdp=1))
    with use_mesh(mesh):
        for k, query_block, candidate_block in (
            (1, 1024, 8192),
            (10, 1024, 8192),
            (10, 3, 7),
            (10, 16, 50),
            (50, 5, 20),
        ):
            products, indices = nearest(
                queries,
                candidates,
                k=k,
                query_block=query_block,
                candidate_block=candidate_block,
            )
            expected = plain_nearest(queries, candidates, k)
            np.testing.assert_array_equal(products, expected[0])
            np.testing.assert_array_equal(indices, expected[1])


def test_a_positive_and_a_negative_zero_are_equal():
    candidates = np.array([[-0.0], [0.0], [-1.0], [-0.0]], np.float32)
    _, indices = nearest(np.ones((1, 1), np.float32), candidates, k=4)
    assert indices.tolist() == [[0, 1, 3, 2]]


def test_nearest_refuses_a_k_beyond_the_candidates_and_nan(rng):
    x = integers(rng, 5)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k} must be from 1 to 5"):
            nearest(x, x, k=k)
    spoiled = x.copy()
    spoiled[3] = np.nan
    with pytest.raises(ValueError, match="has NaN"):
        nearest(x, spoiled, k=2)


def drawn(rng, images, most):
    """1 to `most` captions an image, a third of them shared with other images."""
    names = [f"caption {i}" for i in range(images * most)]
    captions = []
    for i in range(images):
        own = names[i * most : i * most + rng.integers(1, most + 1)]
        shared = rng.random(len(own)) < 1 / 3
        captions.append(
            tuple(
                names[rng.integers(len(names))] if s else c
                for s, c in zip(shared, own, strict=True)
            )
        )
    return captions


@pytest.mark.parametrize("devices", [1, 8])
def test_retrieval_equals_a_plain_one(devices, rng):
    """For 1 to 7 captions an image, with ties, shared captions, unreadable images."""
    mesh, _ = make_mesh(MeshConfig(data=devices, fsdp=1))
    with use_mesh(mesh):
        for most in (1, 3, 7):
            captions = drawn(rng, 23, most)
            unique = list(dict.fromkeys(c for own in captions for c in own))
            texts = integers(rng, len(unique))
            images = integers(rng, 23)
            images[[2, 3, 11]] = np.nan
            places = [{unique.index(c) for c in own} for own in captions]
            retrieval = Retrieval(lambda _, texts=texts: texts, captions)
            found = values(retrieval.run(images))
            assert found == plain_recalls(images, texts, places)
            assert set(found) == set(chances(retrieval.run(images)))


def test_chance_is_among_the_candidates_of_the_recall(rng):
    """Unreadable images and their captions count no more than absent ones."""
    captions = [("a",), ("b", "c"), ("a", "d"), ("e",), ("d",)]
    images = integers(rng, 5)
    images[[1, 4]] = np.nan
    retrieval = Retrieval(lambda texts: integers(rng, len(texts)), captions)
    there = Retrieval(
        lambda texts: integers(rng, len(texts)), [captions[i] for i in (0, 2, 3)]
    )
    assert chances(retrieval.run(images)) == chances(there.run(images[[0, 2, 3]]))
    # "b" and "c" are no candidates: 1, 2 and 1 of "a", "d" and "e" are right.
    assert chances(retrieval.run(images))["image_to_text_r1"] == pytest.approx(4 / 9)
    assert chances(retrieval.run(np.full_like(images, np.nan))) == {}


def test_sharded_over_8_devices_equals_one(rng):
    """Of random vectors, whose products are rounded."""
    images = rng.standard_normal((64, 16)).astype(np.float32)
    texts = rng.standard_normal((96, 16)).astype(np.float32)
    products, indices = nearest(texts, images, k=10)
    mesh, _ = make_mesh(MeshConfig(data=4, fsdp=2))
    assert mesh is not None and mesh.size == jax.device_count() == 8
    with use_mesh(mesh):
        split = nearest(texts, images, k=10)
    np.testing.assert_array_equal(split[1], indices)
    np.testing.assert_allclose(split[0], products, rtol=1e-6, atol=1e-6)


def test_unreadable_images_take_their_captions_with_them(rng):
    images, texts = integers(rng, 3), integers(rng, 3)
    retrieval = Retrieval(lambda _: texts, [("a",), ("b",), ("a", "c")])
    images[2] = np.nan
    # "c" has no image left: two images, two captions.
    assert values(retrieval.run(images)) == plain_recalls(
        images, texts, [{0}, {1}, {0, 2}]
    )
    images[:] = np.nan
    assert values(retrieval.run(images)) == {}


def test_an_image_without_a_caption_is_only_retrieved(caplog):
    texts = np.eye(2, 3, dtype=np.float32)
    images = np.array([[1, 0, 0], [0, 1, 0], [0, 2, 0]], np.float32)
    retrieval = Retrieval(lambda _: texts, [("a",), ("b",), ()])
    assert "1 of 3 images have no caption" in caplog.text
    assert values(retrieval.run(images)) == {
        "image_to_text_r1": 1.0,
        "text_to_image_r1": 0.5,  # "b" finds the third image
    }
    with pytest.raises(ValueError, match="none of the 2 images has a caption"):
        Retrieval(lambda _: texts, [(), ()])


def test_chance_is_the_mean_over_all_draws():
    right = [1, 3, 2]
    pairs = np.array([(q, c) for q, own in enumerate(right) for c in range(own)])
    found = chance(pairs, 6, ks=(1, 2, 4))
    for k, value in found.items():
        draws = list(itertools.combinations(range(6), k))
        hits = [min(draw) < own for own in right for draw in draws]
        assert value == pytest.approx(np.mean(hits))
    assert found[4] < 1 == chance(pairs, 3, ks=(3,))[3]


def test_recall_of_random_vectors_is_chance(rng):
    images, texts = rng.standard_normal((2, 2000, 8)).astype(np.float32)
    pairs = np.stack((np.arange(2000), np.arange(2000)), -1)
    found, guessed = recall(images, texts, pairs), chance(pairs, 2000)
    for k in (1, 5, 10):
        assert abs(found[k] - guessed[k]) < 5 * (guessed[k] / 2000) ** 0.5
