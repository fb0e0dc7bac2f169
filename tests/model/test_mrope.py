"""Ids of language models, against ids counted token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from navit.model.mrope import mrope_angles, mrope_axes
from navit.model.positions import mrope_ids, v2pe_ids

# Two documents and padding. Slots: an image of 2x3, a clip of 3 times 1x2, one of 1x1.
GRIDS = np.int32([[[2, 3], [1, 2], [1, 1]]])
TIMES = (1, 3, 1)
DOCUMENTS = [["text"] * 3 + [0] + ["text"] * 2 + [1] + ["text"], [2] + ["text"] * 2]


def sequence():
    """segment_ids, image_ids, coords, and per token (document, slot or None, place)."""
    segments, images, coords = [], [], []
    for number, document in enumerate(DOCUMENTS):
        for part in document:
            if part == "text":
                places = [(0, 0, 0)]
            else:
                rows, columns = GRIDS[0, part]
                places = list(np.ndindex(TIMES[part], rows, columns))
            segments += [number + 1] * len(places)
            images += [0 if part == "text" else part + 1] * len(places)
            coords += places
    pad = 3
    arrays = (segments + [0] * pad, images + [0] * pad, coords + [(0, 0, 0)] * pad)
    return [jnp.asarray(np.int32(x))[None] for x in arrays]


def test_mrope_ids():
    segments, images, coords = sequence()
    expected = []
    for document in DOCUMENTS:
        at = 0
        for part in document:
            if part == "text":
                expected.append((at, at, at))
                at += 1
                continue
            rows, columns = GRIDS[0, part]
            for t, r, c in np.ndindex(TIMES[part], rows, columns):
                expected.append((at + t, at + r, at + c))
            at += max(rows, columns)
    found = mrope_ids(segments, images, coords, jnp.asarray(GRIDS))
    np.testing.assert_array_equal(found[0], [*expected, *[(0, 0, 0)] * 3])


def test_two_images_side_by_side_are_two():
    segments = jnp.ones((1, 4), jnp.int32)
    images = jnp.asarray([[1, 1, 2, 2]])
    coords = jnp.asarray([[[0, 0, 0], [0, 0, 1]] * 2])
    grids = jnp.asarray([[[1, 2], [1, 2]]])
    found = mrope_ids(segments, images, coords, grids)[0, :, 2]
    np.testing.assert_array_equal(found, [0, 1, 2, 3])


@pytest.mark.parametrize("delta", [1.0, 0.25, 1 / 256])
def test_v2pe_ids(delta):
    segments, images, _ = sequence()
    deltas = jnp.full((1, 3), delta)
    expected = []
    for document in DOCUMENTS:
        last = -1.0
        for part in document:
            if part == "text":
                last += 1
                expected.append(last)
                continue
            count = TIMES[part] * GRIDS[0, part].prod()
            expected += [last + delta * (k + 1) for k in range(count)]
            last = np.ceil(expected[-1])
    found = v2pe_ids(segments, images, deltas)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], np.float32([*expected, 0, 0, 0]))


def test_pairs_of_each_axis():
    chunks, mixed = mrope_axes((16, 24, 24)), mrope_axes((24, 20, 20), interleaved=True)
    assert chunks.tolist() == [0] * 16 + [1] * 24 + [2] * 24
    assert mixed.tolist() == [0, 1, 2] * 20 + [0] * 4
    ids = jnp.asarray([[[3, 50, 7]]])
    angles = mrope_angles(ids, chunks, 1e6)[0, 0]
    assert angles[0] == 3 and angles[16] == pytest.approx(50 * 1e6**-0.25)
    assert angles[63] == pytest.approx(7 * 1e6 ** (-63 / 64))
