"""navit.batch: what `PackedImages.check` accepts and what it refuses."""

import numpy as np
import pytest

from navit.batch import Batch, PackedImages, fill, tokens_per_slot

PATCH = 4


def packed() -> PackedImages:
    """Two rows of 12 tokens: a 2x3 and a 1x4 image, then a 3x2 image alone."""
    out = PackedImages(
        patches=np.zeros((2, 12, PATCH * PATCH * 3), np.uint8),
        segment_ids=np.zeros((2, 12), np.int32),
        coords=np.zeros((2, 12, 2), np.int32),
        grids=np.zeros((2, 2, 2), np.int32),
    )
    for row, slot, start, (rows, columns) in [
        (0, 0, 0, (2, 3)),
        (0, 1, 6, (1, 4)),
        (1, 0, 0, (3, 2)),
    ]:
        for i in range(rows * columns):
            out.patches[row, start + i] = 1 + i
            out.segment_ids[row, start + i] = slot + 1
            out.coords[row, start + i] = divmod(i, columns)
        out.grids[row, slot] = rows, columns
    return out


def test_check_accepts_arrays_that_agree():
    packed().check()
    packed()._replace(patches=np.zeros((2, 12, 48), np.float32)).check()


def test_check_accepts_rows_without_any_image():
    images = packed()
    images.segment_ids[1] = 0
    images.coords[1] = 0
    images.grids[1] = 0
    images.check()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("patches", np.zeros((2, 12), np.uint8), "patches"),
        ("patches", np.zeros((2, 12, 48), np.int32), "patches.*int32"),
        ("segment_ids", np.zeros((2, 11), np.int32), "segment_ids.*11"),
        ("segment_ids", np.zeros((2, 12, 1), np.int32), "segment_ids"),
        ("coords", np.zeros((2, 12), np.int32), "coords"),
        ("coords", np.zeros((2, 12, 3), np.int32), "coords.*3"),
        ("grids", np.zeros((3, 2, 2), np.int32), "grids.*3"),
        ("grids", np.zeros((2, 4), np.int32), "grids"),
    ],
)
def test_check_names_a_field_of_the_wrong_shape_or_type(field, value, words):
    with pytest.raises(ValueError, match=words):
        packed()._replace(**{field: value}).check()


@pytest.mark.parametrize(
    ("field", "where", "value", "words"),
    [
        ("segment_ids", (0, 5), 0, "row 0 slot 0 has 5 tokens.*2, 3"),
        ("segment_ids", (0, 5), 2, "row 0 slot 0 has 5"),
        ("segment_ids", (1, 11), 1, "row 1 slot 0 has 7"),
        ("segment_ids", (0, 5), 3, "segment_ids.*3.*2 slots"),
        ("segment_ids", (0, 5), -1, "segment_ids.*-1"),
        ("grids", (0, 1), (0, 0), "row 0 slot 1 has 4"),
        ("grids", (0, 1), (2, 3), "row 0 slot 1 has 4.*2, 3"),
        ("grids", (1, 1), (1, 1), "row 1 slot 1 has 0"),
    ],
)
def test_check_finds_tokens_that_do_not_fill_their_grid(field, where, value, words):
    images = packed()
    getattr(images, field)[where] = value
    with pytest.raises(ValueError, match=words):
        images.check()


def test_check_finds_coords_that_are_x_and_y():
    # The classic mistake: (column, row) for (row, column) reaches outside the grid.
    images = packed()
    with pytest.raises(ValueError, match="coords"):
        images._replace(coords=images.coords[..., ::-1]).check()


def test_check_finds_coords_outside_the_grid():
    images = packed()
    images.coords[1, 0] = 7, 0
    with pytest.raises(ValueError, match="coords"):
        images.check()


def test_check_refuses_a_grid_of_negative_sides():
    images = packed()
    images.grids[0, 0] = -2, -3  # their product is right
    with pytest.raises(ValueError, match="grid"):
        images.check()


def test_tokens_per_slot_counts_like_a_loop(rng):
    segments = rng.integers(0, 5, (6, 40)).astype(np.int32)
    counts = tokens_per_slot(segments, 4)
    for row in range(6):
        for slot in range(4):
            expected = sum(int(x) == slot + 1 for x in segments[row])
            assert counts[row, slot] == expected


def test_fill_is_the_share_of_tokens_that_are_not_padding():
    assert fill(packed()) == pytest.approx((6 + 4 + 6) / 24)


def batch() -> Batch:
    """The rows of `packed` as one group with four captions."""
    return Batch(
        images=packed(),
        text=np.zeros((1, 4, 5), np.int32),
        owner=np.array([[0, 1], [2, -1]], np.int32),
        label=np.full((2, 2), -1, np.int32),
        id=np.array([[7, 8], [2**40, -1]]),
        size=np.zeros((2, 2, 2), np.int32),
    )


def test_check_accepts_owners_in_any_order_and_several_slots_of_one_owner():
    batch().check()
    batch()._replace(owner=np.array([[3, 1], [1, -1]], np.int32)).check()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("owner", np.zeros((1, 4), np.int32), r"owner .*\(2, 2\), not \(1, 4\)"),
        ("id", np.zeros((2, 3)), r"id .*\(2, 2\).*\(2, 3\)"),
        ("owner", np.array([[0, 1], [2, 3]]), "row 1 slot 1 .*-1 .*3"),
        ("owner", np.array([[0, -1], [2, -1]]), "row 0 slot 1 .*8 .*-1"),
        ("owner", np.array([[0, 4], [2, -1]]), "from -1 to 4.* 4 captions"),
        ("text", np.zeros((3, 4, 5), np.int32), r"text .*\(3, 4, 5\)"),
        ("text", np.zeros((4, 5), np.int32), r"text .*\(4, 5\)"),
    ],
)
def test_check_names_owners_that_are_wrong(field, value, words):
    with pytest.raises(ValueError, match=words):
        batch()._replace(**{field: value}).check()
