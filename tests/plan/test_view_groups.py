"""navit.plan.view_groups: each image's views in one group of rows."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit import strategies
from navit.config import DataConfig
from navit.plan.batches import BatchPlans
from navit.plan.epoch import plan_block
from navit.plan.view_groups import Room, left_out, room_of, shapes_of

PATCH = 4
TILES = strategies.InternVL(16, max_tiles=6, patch=PATCH)  # 16 tokens a view, up to 7
NATIVE = strategies.QwenVL(PATCH, min_pixels=64, max_pixels=2000)


def data_config(**overrides) -> DataConfig:
    defaults = dict(strategy=TILES, row_tokens=64, rows=8, caption_rows=2, open_rows=4)
    return DataConfig(**{**defaults, **overrides})


def random_sizes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 200, (count, 2))


def groups_of(rows, group: int) -> list[list[tuple[int, int]]]:
    """The (image, view) pairs of each group of rows."""
    pairs = list(zip(rows.index.tolist(), rows.views["number"].tolist(), strict=True))
    starts = rows.offsets[::group].tolist()
    return [pairs[a:b] for a, b in itertools.pairwise(starts)]


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from([TILES, NATIVE, strategies.UReader(16, 6, patch=PATCH)]),
    group=st.sampled_from([1, 2, 4]),
    slots=st.sampled_from([None, 3, 8]),
    captions=st.sampled_from([None, 1, 5]),
    count=st.integers(1, 60),
)
def test_a_group_holds_every_view_of_its_images(
    strategy, group, slots, captions, count
):
    data = data_config(strategy=strategy, caption_rows=group)
    sizes = random_sizes(count, count)
    rows = plan_block(
        sizes, data, patch_size=PATCH, epoch=0, slots=slots, captions=captions
    )
    lost = {*left_out(*shapes_of(sizes, strategy, room_of(data, slots))).tolist()}
    planned = []
    for pairs in groups_of(rows, group):
        views = collections.defaultdict(list)
        for image, view in pairs:
            views[image].append(view)
        assert 0 < len(views) <= (captions or count)
        for image, numbers in views.items():
            expected = strategy.views(*sizes[image].tolist())
            assert sorted(numbers) == list(range(len(expected)))
        planned += views
    assert sorted(planned) == sorted({*range(count)} - lost)
    assert rows.images == len(planned)
    assert len(rows) % group == 0
    ends = np.concatenate([[0], np.cumsum(rows.lengths)])[rows.offsets]
    assert (np.diff(ends) <= data.row_tokens).all()
    assert np.diff(rows.offsets).max(initial=0) <= (slots or len(rows.index))
    for i, view in enumerate(rows.views):
        image = int(rows.index[i])
        shown = strategy.views(*sizes[image].tolist())[view["number"]]
        assert rows.grids[i].tolist() == list(shown.grid)
        for name in ("box", "size", "window"):
            assert view[name].tolist() == list(getattr(shown, name))


def test_the_images_that_are_left_out_are_those_that_cannot_fit():
    sizes = np.array([[16, 16], [32, 48], [64, 64], [4, 4000]])
    four, one = Room(4, 16, 16), Room(1, 200, 16)
    shapes, which = shapes_of(sizes, TILES, four)
    # One view; six tiles and a thumbnail; and of 4x4 tiles, the nearest is 2x2.
    counts = [len(TILES.views(*size)) for size in sizes.tolist()]
    expected = [i for i, count in enumerate(counts) if count > 4]
    assert left_out(shapes, which).tolist() == expected and expected
    assert "raise data.caption_rows" in shapes[which[expected[0]]].reason
    shapes, which = shapes_of(sizes, TILES, Room(1, 200, 2))
    assert "or data.slots" in shapes[which[expected[0]]].reason
    shapes, which = shapes_of(sizes, NATIVE, one)
    assert left_out(shapes, which).tolist() == [3]
    assert "200" in shapes[which[3]].reason
    (short,), _ = shapes_of(np.array([[40, 44]]), NATIVE, Room(1, 16, 16))
    assert "an image of 44x40 pixels (width x height)" in short.reason
    assert "more than data.row_tokens=16" in short.reason


def test_all_hosts_together_plan_what_one_host_plans():
    sizes, data = random_sizes(1, 40), data_config()
    options = dict(patch_size=PATCH, steps=12)
    alone = BatchPlans(sizes, data, **options)
    each = [
        BatchPlans(sizes, data, **options, process_index=i, process_count=4)
        for i in range(4)
    ]
    assert alone.steps_per_epoch < 12  # so epochs differ
    for step in range(12):
        rows = alone[step]
        hosts = [host[step] for host in each]
        assert np.concatenate([x.index for x in hosts]).tolist() == rows.index.tolist()
        views = np.concatenate([x.views for x in hosts])
        assert views.tobytes() == rows.views.tobytes()
        assert {len(x) for x in hosts} == {2}
    epochs = [alone[0].index.tolist(), alone[alone.steps_per_epoch].index.tolist()]
    assert epochs[0] != epochs[1]
    filled = alone.statistics()
    assert filled.images_per_row < len(alone[0].index) / 8  # views are not images
    assert 0 < filled.captions_filled <= 1 and 0 < filled.slots_filled <= 1


@pytest.mark.parametrize(
    "setting",
    [
        dict(budgets=(64,)),
        dict(budget_per="batch"),
        dict(max_upscale=1.0),
        dict(square=True),
        dict(flip=True),
        dict(elastic=0.1),
        dict(min_tokens=4),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_a_strategy_would_ignore_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=f"data.{next(iter(setting))}=.*InternVL"):
        data_config(**setting)
