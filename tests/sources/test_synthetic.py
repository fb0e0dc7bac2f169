"""navit.sources.synthetic: the offline dataset."""

import re

import numpy as np
import pytest
from helpers import read_image

from navit.config import Synthetic
from navit.sources.synthetic import COLORS, DOTS, SyntheticSource

SIZE = 300


@pytest.fixture(scope="module")
def source() -> SyntheticSource:
    return SyntheticSource(SIZE, seed=3)


def test_an_image_depends_only_on_seed_and_index(source):
    again, larger = SyntheticSource(SIZE, seed=3), SyntheticSource(2 * SIZE, seed=3)
    for index in (17, 0, 299):  # in another order than drawn before
        for other in (again, larger):
            np.testing.assert_array_equal(
                read_image(source, index), read_image(other, index)
            )
            assert source.record(index).captions == other.record(index).captions
    np.testing.assert_array_equal(larger.sizes[:SIZE], source.sizes)
    for name, task in source.tasks.items():
        assert larger.tasks[name].class_names == task.class_names
        np.testing.assert_array_equal(larger.tasks[name].labels[:SIZE], task.labels)


def test_another_seed_is_another_set(source):
    other = SyntheticSource(SIZE, seed=4)
    same = (source.sizes == other.sizes).all(-1)
    assert same.mean() < 0.1
    labels = [s.tasks["coarse"].labels for s in (source, other)]
    assert (labels[0] == labels[1]).mean() < 0.3


def test_sizes_are_those_of_the_images(source):
    assert len(source) == len(source.sizes) == SIZE
    for index in range(0, SIZE, 10):
        image = read_image(source, index)
        assert image.dtype == np.uint8
        assert image.shape == (*source.sizes[index], 3)


def test_sides_and_aspects_stay_in_their_ranges():
    sizes = SyntheticSource(3000).sizes
    assert sizes.min() >= 64
    assert sizes.max() <= 1024
    # Each side may be rounded by half a pixel.
    long, short = sizes.max(-1), sizes.min(-1)
    assert ((long - 0.5) <= 6 * (short + 0.5)).all()
    # And the whole range is used, lying as well as standing.
    aspect = sizes[:, 0] / sizes[:, 1]
    assert aspect.min() < 1 / 5 and aspect.max() > 5


def test_captions_name_the_classes_of_both_tasks(source):
    coarse, fine = source.tasks["coarse"], source.tasks["fine"]
    for task in (coarse, fine):
        assert len(set(task.class_names)) == len(task.class_names) > 1
    for index in range(SIZE):
        captions = source.record(index).captions
        coarse_name = coarse.class_names[coarse.labels[index]]
        if fine.labels[index] < 0:
            assert captions == (coarse_name,)
        else:
            fine_name = fine.class_names[fine.labels[index]]
            assert coarse_name in captions and fine_name in captions
            assert any(coarse_name in c and fine_name in c for c in captions)


def test_every_class_occurs_and_none_is_rare():
    tasks = SyntheticSource(3000).tasks
    for task in tasks.values():
        known = task.labels[task.labels >= 0]
        counts = np.bincount(known, minlength=len(task.class_names))
        expected = len(known) / len(task.class_names)
        assert counts.min() > expected / 2 and counts.max() < expected * 2


def test_dots_are_drawn_where_they_are_four_pixels_wide(source):
    """From 1/80 to 1/6 of the root of the area; "finest" are those below 1/32."""
    fine, finest = source.tasks["fine"].labels, source.tasks["finest"].labels
    root = np.sqrt(source.sizes.prod(-1))
    diameter = np.array([source._traits(i)[-1] for i in range(SIZE)])
    np.testing.assert_array_equal(fine >= 0, diameter >= 4)
    small = diameter / root < 1 / 32
    np.testing.assert_array_equal(finest, np.where(small, fine, -1))
    assert (fine < 0).any() and (finest >= 0).any() and (finest != fine).any()
    assert (diameter / root).min() < 1 / 60 and (diameter / root).max() > 1 / 8


def test_the_pixels_show_the_colours_of_the_caption(source):
    """Beside one grey, the nearest named colours are those named, and no others."""
    palette = COLORS | DOTS
    names, colors = list(palette), np.array(list(palette.values()))
    for index in range(0, SIZE, 10):
        named = set(re.findall(r"\w+", source.record(index).captions[-1])) - {"dots"}
        pixels = read_image(source, index).reshape(-1, 3).astype(int)
        grey = pixels[(np.ptp(pixels, axis=-1) == 0) & (pixels[:, 0] % 255 > 0)]
        assert len(np.unique(grey)) == 1
        nearest = ((pixels[:, None] - colors) ** 2).sum(-1).argmin(-1)
        nearest = nearest[(pixels != grey[0]).any(-1)]
        assert {names[i] for i in np.unique(nearest)} == named


@pytest.mark.parametrize("index", [-1, SIZE, 10**9])
def test_an_index_outside_is_an_index_error(source, index):
    with pytest.raises(IndexError, match=f"{index}.*{SIZE}"):
        source.record(index)


def test_names_tell_images_apart(source):
    assert len({source.name(index) for index in range(SIZE)}) == SIZE


def test_a_task_may_come_first_and_changes_no_image(source):
    fine = SyntheticSource(SIZE, seed=3, task="fine")
    assert [*fine.tasks] == ["fine", "coarse", "finest"]
    np.testing.assert_array_equal(read_image(fine, 5), read_image(source, 5))
    for name, task in source.tasks.items():
        np.testing.assert_array_equal(fine.tasks[name].labels, task.labels)
    assert fine.fingerprint() != source.fingerprint()


def test_aspects_stay_in_the_range_that_is_asked_for():
    sizes = SyntheticSource(1000, aspect=(3.0, 4.0)).sizes
    long, short = sizes.max(-1), sizes.min(-1)
    assert ((long + 0.5) >= 3 * (short - 0.5)).all()
    assert ((long - 0.5) <= 4 * (short + 0.5)).all()
    lying = (sizes[:, 1] > sizes[:, 0]).mean()
    assert 0.4 < lying < 0.6
    with pytest.raises(ValueError, match=r"within 1 to 6.*\(0.5, 2.0\)"):
        Synthetic(aspect=(0.5, 2.0))
