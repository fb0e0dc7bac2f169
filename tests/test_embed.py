"""Dense features: one array an image, in order, however they are packed."""

from pathlib import Path

import numpy as np
import pytest

import navit
from navit.config import MeshConfig, override
from navit.embed import Embedder
from navit.plan.geometry import grid_for
from navit.sharding import make_mesh, use_mesh

GOLDEN = Path(__file__).parent / "golden/siglip2_a"
MOST = 64


def load(**rules):
    """Images keep their size, so several fit in a row, of which two are a batch."""
    model = navit.load(GOLDEN, **rules)
    options = ["data.max_upscale=1.0", f"eval.batch_tokens={2 * MOST}"]
    return Embedder(model.model, override(model.config, options), step=0)


@pytest.fixture(scope="module")
def embedder():
    return load()


@pytest.fixture
def images(rng):
    sizes = rng.integers(2, 60, (50, 2)).tolist()
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_packed_features_equal_those_of_one_image_at_a_time(embedder, images):
    """Fifty images are three windows of sixteen, and the rest."""
    found = list(embedder.features(images, MOST))
    assert len(found) == len(images)
    vision = embedder.vision.config
    for image, features in zip(images, found, strict=True):
        height, width = image.shape[:2]
        grid = grid_for(
            height,
            width,
            patch_size=vision.patch_size,
            max_tokens=MOST,
            max_upscale=1.0,
        )
        assert features.shape == (*grid, vision.width)
        assert features.dtype == np.float32
        (alone,) = embedder.features([image], MOST)
        np.testing.assert_allclose(features, alone, atol=1e-5)
    assert list(embedder.features([], MOST)) == []


def test_features_over_eight_devices_equal_those_of_one(embedder, images):
    expected = list(embedder.features(images[:20], MOST))
    mesh, rules = make_mesh(MeshConfig())
    with use_mesh(mesh):
        found = list(load(rules=rules).features(images[:20], MOST))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_features_before_an_unreadable_image_are_given(embedder, images):
    """Images are read as they are needed."""
    images = [*images, (Path(navit.__file__)).read_bytes()]
    with pytest.raises(ValueError, match=r"image 50"):
        embedder.features(images, MOST)
    cut = (Path(__file__).parents[1] / "data/sample/cat.jpg").read_bytes()[:3000]
    given = []
    with pytest.raises(ValueError, match=r"image 50 cannot be read"):
        for features in embedder.features([*images[:50], cut], MOST):
            given.append(features)
    assert len(given) == 50
