"""navit.plan.epoch: an epoch as integers, the same on every host."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.config import Crop, DataConfig, TokenDrop
from navit.plan import batches as batch_plans
from navit.plan import epoch as plan
from navit.plan.batches import BatchPlans
from navit.plan.epoch import plan_block
from navit.plan.geometry import grids_for
from navit.plan.order import Part
from navit.plan.rows import Rows

PATCH = 8


def random_sizes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 300, (count, 2))


def data_config(**overrides) -> DataConfig:
    defaults = dict(budgets=(4, 16), row_tokens=40, rows=4, slots=3, open_rows=3)
    return DataConfig(**{**defaults, **overrides})


def plans(sizes, data, steps=20, **host) -> BatchPlans:
    return BatchPlans(sizes, data, patch_size=PATCH, steps=steps, **host)


def as_lists(rows: Rows) -> list[list[tuple[int, int, int]]]:
    """Per row: (record, rows, columns) of each image."""
    images = np.column_stack([rows.index, rows.grids]).tolist()
    return [
        [tuple(image) for image in images[start:stop]]
        for start, stop in itertools.pairwise(rows.offsets)
    ]


options = st.builds(
    dict,
    budgets=st.sampled_from([(4,), (1, 16), (9, 25, 40)]),
    rows=st.sampled_from([1, 2, 4]),
    slots=st.integers(1, 8),
    open_rows=st.integers(1, 8),
    max_upscale=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 3),
)
# With the rows in groups too, where the rows make whole ones.
grouped = st.one_of(
    options,
    st.builds(
        lambda options, group: options | dict(rows=4, caption_rows=group),
        options,
        st.sampled_from([1, 2, 4]),
    ),
)


@settings(max_examples=30, deadline=None)
@given(overrides=grouped, count=st.integers(1, 60), epoch=st.integers(0, 9))
def test_an_epoch_holds_each_image_once_at_the_grid_of_a_budget(
    overrides, count, epoch
):
    data = data_config(**overrides)
    sizes = random_sizes(count, count)
    rows = plan_block(sizes, data, patch_size=PATCH, epoch=epoch, slots=data.slots)
    assert sorted(rows.index.tolist()) == list(range(count))
    possible = [
        grids_for(sizes, budget, patch_size=PATCH, max_upscale=data.max_upscale)
        for budget in data.budgets
    ]
    for row in as_lists(rows):
        assert 0 < len(row) <= data.slots
        assert sum(r * c for _, r, c in row) <= data.row_tokens
        for index, *grid in row:
            assert grid in [table[index].tolist() for table in possible]


def test_an_epoch_is_a_function_of_sizes_config_and_number():
    sizes = random_sizes(0, 50)

    def lists(epoch: int = 1, **overrides):
        data = data_config(**overrides)
        return as_lists(plan_block(sizes, data, patch_size=PATCH, epoch=epoch))

    assert lists() == lists()
    assert lists() != lists(epoch=2)
    assert lists() != lists(seed=1)


def test_every_budget_gets_its_share():
    sizes = np.full((600, 2), 320)  # squares: the budget is the token count
    rows = plan_block(sizes, data_config(), patch_size=PATCH, epoch=0)
    large = (rows.grids.prod(-1) == 16).sum()
    # 300 is expected, the standard deviation is 12.
    assert 240 < large < 360


@settings(max_examples=8, deadline=None)
@given(overrides=options, count=st.integers(1, 60))
def test_batches_repeat_no_image_within_any_of_20_epochs(overrides, count):
    data = data_config(**overrides)
    sizes = random_sizes(count, count)
    batches = plans(sizes, data, steps=10_000)
    seen_ever = set()
    for epoch in range(20):
        seen = [
            int(index)
            for step in range(batches.steps_per_epoch)
            for index in batches[epoch * batches.steps_per_epoch + step].index
        ]
        assert len(seen) == len(set(seen))
        seen_ever |= set(seen)
    # Each epoch may leave some out, but not the same ones.
    if batches.steps_per_epoch > 1:
        assert seen_ever == set(range(count))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("count", [3, 60])
def test_the_rows_of_all_hosts_together_are_the_batch_of_one(hosts, count):
    sizes, data = random_sizes(1, count), data_config()
    alone = plans(sizes, data)
    each = [
        plans(sizes, data, process_index=i, process_count=hosts) for i in range(hosts)
    ]
    assert {len(host) for host in each} == {len(alone)} == {20}
    assert {host.steps_per_epoch for host in each} == {alone.steps_per_epoch}
    for step in range(20):
        together = [row for host in each for row in as_lists(host[step])]
        assert together == as_lists(alone[step])
        assert {len(host[step]) for host in each} == {data.rows // hosts}
        assert {host[step].epoch for host in each} == {step // alone.steps_per_epoch}


def test_rows_past_the_end_of_an_epoch_are_empty():
    rows = plan_block(random_sizes(2, 9), data_config(), patch_size=PATCH, epoch=0)
    padded = as_lists(rows.slice(len(rows) - 1, len(rows) + 3))
    assert padded == [as_lists(rows)[-1], [], [], []]
    assert as_lists(rows.slice(len(rows) + 5, len(rows) + 7)) == [[], []]


def test_a_set_smaller_than_a_batch_still_has_one_step_an_epoch():
    batches = plans(random_sizes(3, 2), data_config(rows=8))
    assert batches.steps_per_epoch == 1
    for step in range(5):
        rows = as_lists(batches[step])
        assert len(rows) == 8
        assert sorted(index for row in rows for index, *_ in row) == [0, 1]


def test_plans_travel_to_a_worker_and_give_the_same_rows():
    batches = plans(random_sizes(4, 60), data_config())
    before = pickle.loads(pickle.dumps(batches))
    wanted = [as_lists(batches[step]) for step in range(20)]
    after = pickle.loads(pickle.dumps(batches))
    for copy in (before, after):
        # Backwards: access is random, and nothing depends on earlier reads.
        got = [as_lists(copy[step]) for step in reversed(range(20))]
        assert got[::-1] == wanted


def test_every_block_is_planned_once_and_before_it_is_needed(monkeypatch):
    monkeypatch.setattr(plan, "_BLOCK_IMAGES", 100)
    monkeypatch.setattr(plan, "_BLOCK_BATCHES", 2)
    asked = []
    real = plan.plan_block

    def counted(*args, epoch, block, **options):
        asked.append((epoch, block))
        return real(*args, epoch=epoch, block=block, **options)

    monkeypatch.setattr(batch_plans, "plan_block", counted)
    batches = plans(random_sizes(5, 250), data_config(), steps=10**6)
    assert batches._first_steps[1] > 2 and asked == [(0, 0), (0, 2)]
    last = 2 * batches.steps_per_epoch
    for step in range(last):
        batches[step]
        *_, count = batches._place(step)
        soon = batches._place(step + (count + 1) // 2)[:2]
        batches._planner.submit(len, ()).result()  # what was asked for is there
        assert soon in asked
    assert sorted(set(asked)) == sorted(asked) and len(asked) in (6, 7)


def test_a_step_beyond_the_last_is_an_index_error():
    # A Sequence without it is endless: `for rows in plans` would never stop.
    batches = plans(random_sizes(5, 60), data_config())
    for step in (20, 1000):
        with pytest.raises(IndexError):
            batches[step]


def test_rows_that_the_hosts_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"rows=4 .* 3 processes"):
        plans(random_sizes(6, 9), data_config(), process_count=3)


def test_one_budget_for_each_batch():
    sizes = np.full((400, 2), 320)
    data = data_config(budget_per="batch", budgets=(4, 16), rows=4, slots=3)
    batches = plans(sizes, data, steps=300)
    assert batches.steps_per_epoch > 10
    found = []
    for step in range(batches.steps_per_epoch):
        lengths = set(batches[step].lengths.tolist())
        assert len(lengths) == 1
        found.append(lengths.pop())
    # Half of the images each: those of 16 tokens fill 2 slots a row, those of 4 three.
    assert abs(found.count(16) / found.count(4) - 1.5) < 0.2
    assert found != sorted(found)


def test_a_budget_without_a_whole_batch_still_has_one():
    data = data_config(budget_per="batch", budgets=(4, 16), rows=64)
    batches = plans(random_sizes(0, 20), data)
    assert batches.steps_per_epoch == 2
    seen = sorted(i for step in (0, 1) for i in batches[step].index.tolist())
    assert seen == list(range(20))


def test_native_resolution_lies_between_two_bounds():
    sizes = random_sizes(3, 400)
    data = data_config(budgets=(40,), max_upscale=1.0, min_tokens=9)
    rows = plan_block(sizes, data, patch_size=PATCH, epoch=0)
    native = np.ceil(sizes[rows.index] / PATCH).prod(-1)
    lengths = rows.lengths
    assert lengths.max() <= 40
    within = (native >= 9) & (native <= 40)
    np.testing.assert_array_equal(lengths[within], native[within])
    assert (lengths[native < 9] >= 5).all()  # up to 9, as the aspect allows
    assert within.any() and (native < 9).any() and (native > 40).any()


def test_square_grids_fit_the_budget_and_enlarge_no_image_beyond_its_own_area():
    sizes = random_sizes(3, 400)
    data = data_config(square=True)
    grids = plan_block(sizes, data, patch_size=PATCH, epoch=0).grids
    assert (grids[:, 0] == grids[:, 1]).all()
    assert {*grids[:, 0].tolist()} == {2, 4}  # the budgets are 4 and 16
    native = dataclasses.replace(data, max_upscale=1.0, budgets=(40,))
    rows = plan_block(sizes, native, patch_size=PATCH, epoch=0)
    side = np.ceil(np.sqrt(sizes[rows.index].prod(-1)) / PATCH - 1e-9)
    np.testing.assert_array_equal(rows.grids[:, 0], np.minimum(side, 6))
    with pytest.raises(ValueError, match=r"elastic=0\.1 gives"):
        data_config(square=True, elastic=0.1)


def test_crops_flips_and_drops_are_in_the_plan_and_save_tokens():
    sizes = random_sizes(1, 300) + 20
    plain = data_config(budgets=(40,))
    rich = data_config(
        budgets=(40,),
        crop=Crop(area=(0.3, 0.6)),
        flip=True,
        drop=TokenDrop(kind="constant", rate=0.5, final_rate=0.5),
    )
    a, b = (plan_block(sizes, d, patch_size=PATCH, epoch=0) for d in (plain, rich))
    assert a.boxes is a.flips is a.kept is None
    assert len(b) < 0.6 * len(a)
    assert sorted(b.index.tolist()) == list(range(300))
    assert (b.boxes[:, :2] + b.boxes[:, 2:] <= sizes[b.index]).all()
    assert 100 < b.flips.sum() < 200
    np.testing.assert_array_equal(b.kept, np.round(b.grids.prod(-1) * 0.5))
    for row in range(len(b)):
        part = b.slice(row, row + 1)
        assert part.lengths.sum() <= rich.row_tokens
        np.testing.assert_array_equal(
            part.boxes, b.boxes[b.offsets[row] : b.offsets[row + 1]]
        )


@pytest.mark.parametrize("drop", [None, TokenDrop(rate=0.3, final_rate=0.3)])
def test_elastic_fit_fills_rows_and_takes_no_more_than_its_share(drop):
    sizes = random_sizes(2, 2000) + 30
    rigid = data_config(budgets=(15, 22), slots=8, drop=drop)
    elastic = dataclasses.replace(rigid, elastic=0.2)
    a, b = (plan_block(sizes, d, patch_size=PATCH, epoch=0) for d in (rigid, elastic))
    assert sorted(b.index.tolist()) == list(range(2000))
    fill = [rows.lengths.sum() / len(rows) / 40 for rows in (a, b)]
    assert fill[1] > fill[0] + 0.005
    before = dict(zip(a.index.tolist(), a.lengths.tolist(), strict=True))
    shares = [
        length / before[i]
        for i, length in zip(b.index.tolist(), b.lengths.tolist(), strict=True)
    ]
    assert 0.8 <= min(shares) < max(shares) == 1


def test_elastic_fit_keeps_to_the_least_tokens():
    sizes = random_sizes(2, 1500) + 30
    data = data_config(budgets=(30,), slots=8, min_tokens=28, elastic=0.4)
    rigid = dataclasses.replace(data, elastic=0.0)
    a, b = (plan_block(sizes, d, patch_size=PATCH, epoch=0) for d in (rigid, data))
    before = dict(zip(a.index.tolist(), a.lengths.tolist(), strict=True))
    after = dict(zip(b.index.tolist(), b.lengths.tolist(), strict=True))
    gave = [i for i in before if after[i] != before[i]]
    assert all(after[i] >= 28 for i in gave)


def test_a_long_epoch_in_blocks_holds_each_image_once(monkeypatch):
    monkeypatch.setattr(plan, "_BLOCK_IMAGES", 100)
    monkeypatch.setattr(plan, "_BLOCK_BATCHES", 2)
    sizes, data = random_sizes(1, 730), data_config(rows=2)
    batches = plans(sizes, data, steps=10_000)
    for epoch in (0, 3):
        seen = [
            int(index)
            for step in range(batches.steps_per_epoch)
            for index in batches[epoch * batches.steps_per_epoch + step].index
        ]
        assert len(seen) == len(set(seen)) > 0.9 * 730
    # No step is empty, though blocks are not all of one length.
    for seed in range(6):
        batches = plans(sizes, data_config(rows=2, seed=seed), steps=10_000)
        steps = range(batches.steps_per_epoch)
        assert all(len(batches[step].index) for step in steps)
    first = set(batches[0].index.tolist())
    assert max(first) - min(first) > 200  # from the whole set, not one part of it


def test_a_mixture_takes_from_its_parts_by_weight():
    parts = (Part(0, 300, 1.0), Part(300, 1000, 3.0), Part(1300, 50, 0.25))
    sizes, data = random_sizes(1, 1350), data_config()
    rows = plan_block(sizes, data, patch_size=PATCH, epoch=0, parts=parts)
    assert len(set(rows.index.tolist())) == len(rows.index)
    counts = np.histogram(rows.index, [0, 300, 1300, 1350])[0]
    # The third has the fewest for its weight: all its 50, then 200 and 600.
    assert counts.tolist() == [200, 600, 50]
    again = plan_block(sizes, data, patch_size=PATCH, epoch=1, parts=parts)
    assert set(again.index.tolist()) != set(rows.index.tolist())


def test_a_part_too_light_to_be_drawn_is_refused():
    parts = (Part(0, 100, 1000.0), Part(100, 100, 1.0))
    with pytest.raises(ValueError, match="source 1 of the mixture has weight 1 of"):
        plan_block(
            random_sizes(1, 200), data_config(), patch_size=PATCH, epoch=0, parts=parts
        )


def test_parts_without_weights_give_all_their_images():
    counts = [1626, 933, 579, 631]
    offsets = np.cumsum([0, *counts[:-1]]).tolist()
    weights = (np.array(counts) / sum(counts)).tolist()
    parts = tuple(map(Part, offsets, counts, weights))
    rows = plan_block(
        random_sizes(1, sum(counts)),
        data_config(),
        patch_size=PATCH,
        epoch=0,
        parts=parts,
    )
    assert sorted(rows.index.tolist()) == list(range(sum(counts)))


def test_what_one_budget_a_batch_leaves_out_is_counted():
    sizes = np.full((1001, 2), 320)
    data = data_config(budget_per="batch", budgets=(4, 16), rows=32, slots=3)
    batches = plans(sizes, data, steps=10_000)
    used, left_out = batches.first_block()
    seen = sum(len(batches[i].index) for i in range(batches.steps_per_epoch))
    assert len(used.index) == seen < 1001
    assert left_out == 1 - seen / 1001


def test_default_slots_are_twice_the_mean_to_a_power_of_two():
    sizes = np.full((200, 2), 320)
    data = data_config(budgets=(4, 16), row_tokens=64, slots=None)
    assert plans(sizes, data).slots == 16  # 64 / 10 = 6.4 images a row
    assert plans(sizes, dataclasses.replace(data, slots=5)).slots == 5
    assert "slots" in plans(sizes, data).summary()


NAFLEX = (128, 256, 576, 784, 1024)


@pytest.mark.parametrize("row_tokens", [1024, 4096])
def test_groups_of_rows_hold_no_more_captions_than_they_have_places(row_tokens):
    sizes = np.random.default_rng(0).integers(300, 900, (20_000, 2))
    data = DataConfig(
        budgets=NAFLEX,
        row_tokens=row_tokens,
        rows=16,
        slots=None,
        caption_rows=8,
    )
    batches = BatchPlans(sizes, data, patch_size=16, steps=10_000)
    for epoch in (0, 5):
        images = 0
        for step in range(batches.steps_per_epoch):
            rows = batches[epoch * batches.steps_per_epoch + step]
            assert np.diff(rows.offsets[::8]).max() <= batches.captions
            images += len(rows.index)
        places = batches.steps_per_epoch * 2 * batches.captions
        assert images / places > 0.9
        # Less than a batch is left out at the end, and nothing because of captions.
        assert len(sizes) - images < 2 * batches.captions + 0.0003 * len(sizes)
    assert f"of {batches.captions} places in 8 rows" in batches.summary()


@pytest.mark.parametrize(
    "overrides",
    [
        dict(budget_per="batch"),
        dict(elastic=0.3),
        dict(drop=TokenDrop(rate=0.2, final_rate=0.6, midpoint=600.0, timescale=100.0)),
        dict(captions=3),
    ],
)
def test_groups_keep_to_their_places_whatever_is_drawn(overrides):
    sizes = random_sizes(1, 400)
    data = data_config(rows=8, slots=8, caption_rows=4, **overrides)
    parts = (Part(0, 300, 1.0), Part(300, 100, 1.0))
    batches = plans(sizes, data, steps=10_000, parts=parts)
    hosts = [
        plans(sizes, data, 10_000, parts=parts, process_index=i, process_count=2)
        for i in range(2)
    ]
    alone = dataclasses.replace(data, caption_rows=None, captions=None)
    plain = plans(sizes, alone, parts=parts)
    assert batches.captions == overrides.get("captions", batches.captions)
    for epoch in (0, 1, 9):
        seen = []
        first, end = batches._first_steps[[epoch, epoch + 1]]
        for step in range(first, end):
            rows = batches[step]
            together = [row for host in hosts for row in as_lists(host[step])]
            assert together == as_lists(rows)
            assert np.diff(rows.offsets[::4]).max() <= batches.captions
            seen += rows.index.tolist()
        assert len(seen) == len(set(seen))
    # Images without a place are left out, and counted as such.
    used, left_out = batches.first_block()
    assert len(used) == batches.steps_per_epoch * data.rows
    assert left_out == 1 - len(used.index) / 200
    few = "captions" in overrides
    assert (left_out > plain.first_block()[1] + 0.2) == few


def test_groups_that_the_hosts_cannot_share_are_refused():
    data = data_config(rows=4, caption_rows=4)
    with pytest.raises(ValueError, match=r"rows=4 over 2 processes .*caption_rows=4"):
        plans(random_sizes(1, 20), data, process_count=2)


@pytest.mark.parametrize(("per", "blocks"), [("image", 1), ("batch", 3)])
@pytest.mark.parametrize(("rate", "final_rate"), [(0.1, 0.8), (0.8, 0.1)])
def test_epochs_have_the_steps_that_their_rate_of_dropped_tokens_needs(
    rate, final_rate, per, blocks, monkeypatch
):
    monkeypatch.setattr(plan, "_BLOCK_IMAGES", 3000 // blocks)
    monkeypatch.setattr(plan, "_BLOCK_BATCHES", 1)
    drop = TokenDrop("constant", rate, final_rate, midpoint=6000.0, timescale=1100.0)
    data = data_config(
        budgets=(20, 40), budget_per=per, row_tokens=80, slots=32, rows=2, drop=drop
    )
    batches = plans(random_sizes(1, 3000) + 40, data, steps=1600)
    used: dict[int, int] = {}
    for step in range(1600):
        rows = batches[step]
        assert len(rows.index), step
        used[rows.epoch] = used.get(rows.epoch, 0) + len(rows.index)
    used.pop(max(used))  # which the run does not end
    assert len(used) >= 4
    assert min(used.values()) > 0.94 * 3000
    assert sum(used.values()) > 0.95 * 3000 * len(used)


@pytest.mark.parametrize("budget_per", ["image", "batch"])
def test_a_schedule_of_dropped_tokens_holds_within_an_epoch(budget_per):
    """Most images of a batch drop what its place asks for; few waited in open rows."""
    drop = TokenDrop("constant", 0.8, final_rate=0.2, midpoint=1e4, timescale=10.0)
    data = data_config(budgets=(16, 25), budget_per=budget_per, drop=drop, slots=8)
    sizes = np.full((20_000, 2), 100)
    rows = plan_block(sizes, data, patch_size=PATCH, epoch=0, slots=8)
    batches = [rows.slice(i, i + data.rows) for i in range(0, len(rows), data.rows)]
    rates = [np.median(1 - batch.kept / batch.grids.prod(-1)) for batch in batches]
    seen = np.cumsum([len(batch.index) for batch in batches])
    assert min(rate for rate, n in zip(rates, seen, strict=True) if n < 8_000) > 0.75
    assert max(rate for rate, n in zip(rates, seen, strict=True) if n > 12_000) < 0.25


def test_images_that_a_mixture_never_draws_are_counted_and_logged():
    parts = (Part(0, 100, 1.0), Part(100, 10_000, 1.0))
    batches = plans(random_sizes(1, 10_100), data_config(), parts=parts)
    assert batches.never_drawn == 9900
    assert "weights of the mixture leave out 9900 of 10100" in batches.summary()
    assert "mixture" not in plans(random_sizes(1, 100), data_config()).summary()


def test_no_two_draws_share_a_random_key(monkeypatch):
    keys = []
    real = np.random.default_rng

    def noted(key):
        keys.append(tuple(np.trim_zeros(key, "b")) if isinstance(key, list) else key)
        return real(key)

    monkeypatch.setattr(np.random, "default_rng", noted)
    parts = (Part(0, 100, 1.0), Part(100, 100, 1.0))
    options = dict(patch_size=PATCH, epoch=0, parts=parts, block_images=40)
    for block in range(5):
        plan_block(random_sizes(1, 200), data_config(), block=block, **options)
    used = [key for key in keys if isinstance(key, tuple)]
    # All blocks share the keys of the order and of the two parts; one is their own.
    assert len(set(used)) == 3 + 5
