"""navit.plan.lanes: an epoch of chunks, dealt to lanes that hosts share."""

import pickle
import zlib

import numpy as np
import pytest

from navit import strategies
from navit.config import DataConfig, Sides, TokenDrop, override
from navit.plan import lanes as lanes_module
from navit.plan.batches import BatchPlans
from navit.plan.lanes import chunk_ends, lanes_of
from navit.plan.order import Part

PATCH = 16
LANES, CHUNK, WINDOW = 4, 8, 2


def data_config(**overrides) -> DataConfig:
    defaults = dict(
        budgets=(4, 9, 16),
        row_tokens=48,
        rows=8,
        lanes=LANES,
        chunk=CHUNK,
        window=WINDOW,
        open_rows=4,
    )
    return DataConfig(**{**defaults, **overrides})


def random_sizes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 400, (count, 2))


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Lanes of several blocks, in sets of a few hundred images."""
    monkeypatch.setattr(lanes_module, "_BLOCK_IMAGES", 4 * CHUNK * WINDOW)


def plans(sizes, data, *, steps=60, hosts=1, **options) -> list[BatchPlans]:
    return [
        BatchPlans(
            sizes,
            data,
            patch_size=PATCH,
            steps=steps,
            process_index=i,
            process_count=hosts,
            **options,
        )
        for i in range(hosts)
    ]


@pytest.mark.parametrize("count", [1, 7, 512, 1003])
@pytest.mark.parametrize("epoch", [0, 3])
def test_lanes_hold_each_record_once_in_whole_chunks(count, epoch):
    lanes = lanes_of(data_config(), (), count)
    seen = []
    for lane in range(LANES):
        for block in range(len(lanes.blocks())):
            records, before = lanes.order(epoch, block, lane)
            size = CHUNK * WINDOW
            for window in np.split(records, range(size, len(records), size)):
                full = count % CHUNK == 0  # else a short chunk moves the windows
                assert not full or len({*(window // CHUNK).tolist()}) <= WINDOW
            assert (np.diff(np.sort(before)) >= 0).all()
            seen += records.tolist()
    assert sorted(seen) == list(range(count))
    assert lanes.images == count
    assert lanes.blocks().sum() == max(1, count)


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    def order(epoch=0, seed=0):
        return lanes_of(data_config(seed=seed), (), 500).order(epoch, 0, 1)[0].tolist()

    assert order() == order()
    assert len({tuple(order()), tuple(order(1)), tuple(order(0, 1))}) == 3


@pytest.mark.parametrize(
    "parts, expected",
    [
        ((), 414969390),
        ((Part(0, 600, 1.0), Part(600, 403, 3.0)), 4115999311),
    ],
)
def test_runs_that_are_saved_go_on_in_their_order(parts, expected):
    """If this changes, so must `navit.plan.epoch.VERSION`."""
    found = lanes_of(data_config(), parts, 1003).order(epoch=2, block=1, lane=3)
    assert zlib.crc32(np.concatenate(found).astype("<i8").tobytes()) == expected


OPTIONS = [
    [],
    ["caption_rows=2"],
    ["sides.low=32", "sides.high=64"],
    ["crop.area=0.5,1.0", "flip=true", "elastic=0.2"],
    ["drop.rate=0.5", "drop.final_rate=0.1", "drop.midpoint=300", "drop.timescale=100"],
    ["strategy=internvl:32", "strategy.patch=16", "strategy.merge=1", "budgets=256"],
    ["max_upscale=1.0"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_batches_do_not_depend_on_the_hosts(options):
    sizes, data = random_sizes(1, 700), override(data_config(), options)
    (alone,) = plans(sizes, data)
    assert alone.steps_per_epoch < 60  # an epoch ends within these steps
    two, four = plans(sizes, data, hosts=2), plans(sizes, data, hosts=4)
    for step in (0, 1, alone.steps_per_epoch - 1, alone.steps_per_epoch, 59):
        rows = alone[step]
        assert len(rows) == data.rows
        for hosts in (two, four):
            parts = [host[step] for host in hosts]
            assert {len(part) for part in parts} == {data.rows // len(hosts)}
            for name in ("index", "grids", "kept", "boxes", "flips", "views"):
                values = [getattr(part, name) for part in parts]
                if values[0] is not None:
                    joined = np.concatenate(values)
                    assert joined.tobytes() == getattr(rows, name).tobytes(), name
            counts = np.concatenate([np.diff(part.offsets) for part in parts])
            np.testing.assert_array_equal(counts, np.diff(rows.offsets))
    copy = pickle.loads(pickle.dumps(four[1]))
    np.testing.assert_array_equal(copy[7].index, four[1][7].index)


def test_an_epoch_has_each_image_at_most_once_and_nearly_all():
    sizes, data = random_sizes(2, 3000), data_config()
    (batches,) = plans(sizes, data, steps=10_000)
    steps = batches.steps_per_epoch
    epochs = []
    for epoch in range(2):
        rows = [batches[step] for step in range(epoch * steps, (epoch + 1) * steps)]
        seen = [index for part in rows for index in part.index.tolist()]
        assert len(seen) == len({*seen}) > 0.9 * len(sizes)
        epochs.append(seen)
        assert {part.epoch for part in rows} == {epoch}
    assert epochs[0] != epochs[1]


def test_neighbours_are_used_within_a_few_windows():
    """So a host that reads a chunk whole keeps few images of it."""
    sizes, data = random_sizes(3, 3000), data_config()
    (batches,) = plans(sizes, data, steps=10_000)
    for lane in range(LANES):
        records, steps = batches.used(0, lane)
        chunks = records // CHUNK
        images = np.bincount(steps).mean()
        for chunk in {*chunks.tolist()}:
            own = steps[chunks == chunk]
            # Rows of a window are shuffled, and a row may stay open for a while.
            assert np.ptp(own) * images < 4 * WINDOW * CHUNK + data.open_rows * 5
    own, steps = batches.used(5, 1)
    for step in (0, 5):
        expected = batches.of_lanes(step, [1]).index
        assert sorted(own[steps == step].tolist()) == sorted(expected.tolist())


def test_a_mixture_keeps_its_weights_to_a_chunk():
    sizes = random_sizes(4, 1000)
    parts = (Part(0, 600, 1.0), Part(600, 400, 3.0))
    lanes = lanes_of(data_config(), parts, len(sizes))
    records = np.concatenate(
        [
            lanes.order(0, block, lane)[0]
            for lane in range(LANES)
            for block in range(len(lanes.blocks()))
        ]
    )
    assert len({*records.tolist()}) == len(records)
    first, second = (records < 600).sum(), (records >= 600).sum()
    assert second == 400 and abs(first - 400 / 3) <= CHUNK
    (batches,) = plans(sizes, data_config(), parts=parts)
    assert (batches[0].index >= 600).mean() > 0.5


def random_groups(seed: int, count: int, largest: int) -> np.ndarray:
    """Ends of groups of 0 to `largest` records, `count` in all."""
    sizes = np.random.default_rng(seed).integers(0, largest + 1, 4 * count)
    ends = np.cumsum(sizes)
    return np.append(ends[ends < count], count)


@pytest.mark.parametrize("largest", [1, 3, CHUNK, 2 * CHUNK])
def test_chunks_end_where_groups_end_and_are_as_large_as_fits(largest):
    groups = random_groups(largest, 700, largest)
    ends = chunk_ends(groups, data_config())
    assert ends[-1] == 700 and {*ends.tolist()} <= {*groups.tolist()}
    held = np.diff(ends, prepend=0)
    assert (held > 0).all()
    for start, end in zip(ends - held, ends, strict=True):
        own = groups[(groups > start) & (groups <= end)]
        assert end - start <= CHUNK or len({*own.tolist()}) == 1
        after = groups[groups > end]
        assert not len(after) or after[0] - start > CHUNK  # the next does not fit
    with pytest.raises(ValueError, match=r"a group of 17 records.*fit the 16 .*window"):
        chunk_ends(np.array([4, 21]), data_config())


@pytest.mark.parametrize("largest", [3, 2 * CHUNK])
def test_lanes_of_groups_hold_each_record_once_in_whole_chunks(largest):
    ends = chunk_ends(random_groups(1, 1003, largest), data_config())
    parts = (Part(0, 1003, 1.0, ends),)
    lanes = lanes_of(data_config(), parts, 1003)
    ranges = lanes.ranges(np.arange(1003))
    np.testing.assert_array_equal(np.unique(ranges[:, 1]), ends)
    assert (
        np.diff(ranges)[:, 0]
        == np.diff(ends, prepend=0).repeat(np.diff(ends, prepend=0))
    ).all()
    assert (ranges[:, 0] <= np.arange(1003)).all()
    assert (np.arange(1003) < ranges[:, 1]).all()
    blocks = range(len(lanes.blocks()))
    held = [[lanes.order(2, block, i)[0] for block in blocks] for i in range(LANES)]
    seen = np.concatenate([records for lane in held for records in lane])
    assert sorted(seen.tolist()) == list(range(1003)) and lanes.images == 1003
    place = {
        i: (lane, b)
        for lane in range(LANES)
        for b in blocks
        for i in held[lane][b].tolist()
    }
    for start, end in np.unique(ranges, axis=0).tolist():
        assert len({place[i] for i in range(start, end)}) == 1
    # A window holds about as many records as without groups.
    assert CHUNK <= lanes.window * lanes.chunk <= 1.5 * WINDOW * CHUNK
    assert abs(lanes.blocks().sum() - 1003) <= len(blocks)


def test_a_mixture_with_groups_keeps_its_weights():
    """Parts whose chunks have other sizes give as many images as their weight says."""
    data, sizes = data_config(), random_sizes(6, 1200)
    ends = chunk_ends(np.arange(3, 601, 3), data)  # chunks of 6
    parts = (Part(0, 600, 1.0, ends), Part(600, 600, 2.0))
    (batches,) = plans(sizes, data, parts=parts)
    steps = batches.steps_per_epoch
    rows = [batches[step].index for step in range(steps)]
    seen = np.concatenate(rows)
    assert len({*seen.tolist()}) == len(seen) > 0.8 * 900
    assert abs((seen >= 600).mean() - 2 / 3) < 0.04
    few, many = (plans(sizes, data, hosts=n, parts=parts) for n in (2, 4))
    for step in (0, steps - 1, steps, steps + 3):
        expected = batches[step].index.tolist()
        for hosts in (few, many):
            assert np.concatenate([h[step].index for h in hosts]).tolist() == expected


def test_what_lanes_cannot_plan_is_refused():
    for overrides, message in (
        (dict(rows=6), r"data\.rows=6 cannot be shared evenly by data\.lanes=4"),
        (dict(rows=4, caption_rows=2), "in groups of 2"),
        (dict(budget_per="batch"), "one budget for a whole batch"),
        (dict(workers=3), r"data\.workers=3 cannot share data\.lanes=4"),
    ):
        with pytest.raises(ValueError, match=message):
            data_config(**overrides)
    with pytest.raises(ValueError, match="not divisible by 8 processes"):
        plans(random_sizes(5, 100), data_config(), hosts=8)


def test_all_kinds_of_draws_are_covered_above():
    """A new draw of DataConfig must be planned in lanes, or refused."""
    drawn = {Sides, TokenDrop, strategies.InternVL}
    data = [override(data_config(), options) for options in OPTIONS]
    found = {type(x) for d in data for x in (d.sides, d.drop, d.strategy)}
    assert drawn <= found
