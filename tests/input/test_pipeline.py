"""navit.input.pipeline: images -> rows, and plan -> training batches."""

import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_image
from PIL import Image

import navit
from navit.batch import Batch, PackedImages
from navit.bench import input as bench_input
from navit.config import (
    Config,
    Crop,
    DataConfig,
    Folder,
    ModelConfig,
    PositionConfig,
    Synthetic,
    TextConfig,
    TokenDrop,
    TrainConfig,
    VisionConfig,
)
from navit.input import memory, pixels
from navit.input.fill import fill_rows
from navit.input.make_batch import MakeBatch
from navit.input.pipeline import (
    check_memory,
    open_eval_source,
    open_source,
    train_batches,
)
from navit.input.tokens import encode
from navit.plan.batches import BatchPlans
from navit.plan.rows import Rows
from navit.sources.images import size_of
from navit.sources.source import Record
from navit.sources.synthetic import SyntheticSource

STEPS = 8


def config(steps: int = STEPS, **overrides) -> Config:
    """Batches of 2 rows from 40 images, a few steps per epoch."""
    defaults = dict(
        train=Synthetic(size=40, seed=2),
        budgets=(9, 16),
        row_tokens=48,
        rows=2,
        slots=4,
    )
    return Config(
        model=ModelConfig(text=TextConfig(length=24)),
        data=DataConfig(**{**defaults, **overrides}),
        train=TrainConfig(steps=steps),
    )


def batches(cfg: Config, source=None, **options) -> list[Batch]:
    return list(train_batches(cfg, source or open_source(cfg.data.train), **options))


def arrays(batch: Batch) -> list[np.ndarray]:
    return [*batch.images, *batch[1:]]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(arrays(a), arrays(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def solid(height: int, width: int, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def noise(rng, sizes) -> list[np.ndarray]:
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_pack_puts_each_image_once_with_its_own_patches(rng):
    sizes = [(1, 1), (37, 911), (300, 400), (16, 16), (90, 20), (50, 50), (5, 3000)]
    images = noise(rng, sizes)
    packed, index = navit.pack(
        images, patch_size=8, max_tokens=30, row_tokens=64, return_index=True
    )
    packed.check()
    assert index.shape == packed.grids.shape[:2]
    held = index[index >= 0]
    assert sorted(held.tolist()) == list(range(len(images)))
    np.testing.assert_array_equal(index >= 0, packed.grids.prod(-1) > 0)
    for row, slot in np.argwhere(index >= 0):
        image = images[index[row, slot]]
        grid = navit.grid_for(*image.shape[:2], patch_size=8, max_tokens=30)
        assert tuple(packed.grids[row, slot]) == grid
        mine = packed.segment_ids[row] == slot + 1
        expected = np.zeros((grid[0] * grid[1], 192), np.uint8)
        pixels.to_patches(pixels.load(image, grid[0] * 8, grid[1] * 8), 8, expected)
        np.testing.assert_array_equal(packed.patches[row, mine], expected)
        coords = list(itertools.product(range(grid[0]), range(grid[1])))
        assert packed.coords[row, mine].tolist() == [list(c) for c in coords]
    padding = packed.segment_ids == 0
    assert padding.any()
    assert not packed.patches[padding].any() and not packed.coords[padding].any()


@pytest.mark.parametrize("size", [(1, 1), (37, 911), (3000, 4000), (1, 5000)])
@pytest.mark.parametrize("max_tokens", [1, 2, 256, 729])
def test_pack_takes_any_size_at_any_budget(size, max_tokens):
    packed = navit.pack([solid(*size)], max_tokens=max_tokens, row_tokens=729)
    packed.check()
    assert packed.patches.shape == (1, 729, 768)
    assert 0 < (packed.segment_ids > 0).sum() <= max_tokens
    assert (packed.patches[packed.segment_ids > 0] == 90).all()


def test_the_mask_of_four_squares_in_one_row_lets_each_see_itself():
    sides = (256, 384, 432, 512)  # 16, 24, 27 and 32 patches of 16
    packed = navit.pack(
        [solid(side, side) for side in sides],
        max_tokens=1024,
        row_tokens=2585,
        max_upscale=1.0,
    )
    assert packed.segment_ids.shape == (1, 2585)
    assert sorted(packed.grids[0].prod(-1).tolist()) == [256, 576, 729, 1024]
    (segments,) = packed.segment_ids
    mask = segments[:, None] == segments[None, :]
    assert mask.sum() == 256**2 + 576**2 + 729**2 + 1024**2 == 1_977_329


def test_pack_respects_the_slots(rng):
    images = noise(rng, [(8, 8)] * 7)
    packed, index = navit.pack(
        images, patch_size=8, max_tokens=1, row_tokens=10, slots=3, return_index=True
    )
    assert packed.grids.shape == (3, 3, 2)
    assert (index >= 0).sum(-1).max() <= 3
    assert sorted(index[index >= 0].tolist()) == list(range(7))


@pytest.mark.parametrize("count", [0, 1, 9, 40])
def test_pack_into_fixed_rows_leaves_out_only_what_has_no_room(rng, count):
    images = noise(rng, rng.integers(8, 60, (count, 2)))
    rule = dict(patch_size=8, max_tokens=20, max_upscale=1.0)
    packed, index, left_out = navit.pack(images, **rule, row_tokens=32, rows=3, slots=4)
    packed.check()
    assert packed.patches.shape == (3, 32, 192)
    assert packed.grids.shape == (3, 4, 2) and index.shape == (3, 4)
    np.testing.assert_array_equal(index >= 0, packed.grids.prod(-1) > 0)
    assert left_out.tolist() == sorted(set(range(count)) - set(index.flat))
    assert (index >= 0).sum() + len(left_out) == count
    for image in left_out:
        before = (index >= 0) & (index < image)
        room = 32 - np.where(before, packed.grids.prod(-1), 0).sum(-1)
        tokens = np.prod(navit.grid_for(*images[image].shape[:2], **rule))
        assert not ((room >= tokens) & (before.sum(-1) < 4)).any()


def test_unpack_is_the_inverse_of_pack(rng):
    """In the images' order, with tokens in any order, padding between, empty slots."""
    sizes = [(8, 24), (40, 16), (8, 8), (24, 24), (16, 32), (60, 8), (9, 9)]
    images = noise(rng, sizes)
    packed, index, left_out = navit.pack(
        images, patch_size=8, max_tokens=12, row_tokens=24, rows=2, slots=4
    )
    assert len(left_out) and (index < 0).any()
    shuffle = rng.permutation(24)
    packed = packed._replace(
        patches=packed.patches[:, shuffle],
        segment_ids=packed.segment_ids[:, shuffle],
        coords=packed.coords[:, shuffle],
    )
    expected = {}
    for i, image in enumerate(images):
        rows, columns = navit.grid_for(*image.shape[:2], patch_size=8, max_tokens=12)
        expected[i] = np.zeros((rows * columns, 192), np.uint8)
        pixels.to_patches(pixels.load(image, rows * 8, columns * 8), 8, expected[i])
        expected[i] = expected[i].reshape(rows, columns, 192)
    for order, found in (
        (index[index >= 0], navit.unpack(packed.patches, packed)),
        (np.sort(index[index >= 0]), navit.unpack(packed.patches, packed, index)),
        (index[index >= 0], navit.unpack(jnp.asarray(packed.patches), packed)),
    ):
        for i, image in zip(order, found, strict=True):
            np.testing.assert_array_equal(image, expected[i])


def test_unpack_refuses_dropped_tokens_and_other_shapes(rng):
    packed = navit.pack([solid(16, 24)], patch_size=8, max_tokens=6, row_tokens=8)
    dropped = packed._replace(segment_ids=packed.segment_ids.copy())
    dropped.segment_ids[0, 2] = 0
    with pytest.raises(ValueError, match=r"row 0 slot 0 has 5 .* 2x3 .*drop"):
        navit.unpack(packed.patches, dropped)
    with pytest.raises(ValueError, match=r"\[1, 8, d\], not \(1, 7, 192\)"):
        navit.unpack(packed.patches[:, :7], packed)
    with pytest.raises(ValueError, match=r"index must be \(1, 1\), not \(1, 2\)"):
        navit.unpack(packed.patches, packed, np.zeros((1, 2), int))


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        ([], {}, "no images"),
        ([solid(8, 8)], {"rows": 0, "slots": 1}, "rows.*0"),
        ([solid(8, 8)], {"rows": 2}, "rows=2.*slots"),
        ([solid(8, 8)], {"max_tokens": 300, "row_tokens": 256}, "300.*256"),
        ([solid(8, 8)], {"max_tokens": 0}, "max_tokens.*0"),
        ([solid(8, 8)], {"slots": 0}, "slots.*0"),
        ([solid(8, 8)], {"slots": -1}, "slots.*-1"),
        ([solid(8, 8), b"not an image"], {}, "image 1"),
        ([solid(8, 8), solid(8, 8).astype(np.float32)], {}, "image 1.*float32"),
    ],
)
def test_pack_refuses_what_it_cannot_pack_by_name_and_value(images, options, words):
    with pytest.raises(ValueError, match=words):
        navit.pack(images, **options)


def test_pack_names_the_image_that_breaks_off_in_its_pixels(rng):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(out, "JPEG")
    cut = out.getvalue()[:2000]
    assert size_of(cut) == (64, 64)  # the header is whole
    with pytest.raises(ValueError, match="image 2 "):
        navit.pack([solid(8, 8), solid(8, 8), cut])


@pytest.mark.parametrize(
    ("options", "estimate"),
    [
        ({"row_tokens": 10**12}, r"into 1 x 1000000000000 tokens .* 768,000.0"),
        ({"rows": 10**9, "slots": 1}, r"into 1000000000 x 1024 tokens .* 786,432.0"),
    ],
)
def test_pack_refuses_before_it_allocates_what_no_machine_has(options, estimate):
    tracemalloc.start()
    with pytest.raises(ValueError, match=estimate + r".* GB .*: lower"):
        navit.pack([solid(8, 8)], **options)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


def test_pack_refuses_by_the_rows_that_it_made(monkeypatch):
    """Images a little over half a row need twice the rows that their tokens fill."""
    monkeypatch.setattr(memory, "free_memory", lambda: 6 * 5 * 192)
    images = [solid(24, 8)] * 7
    with pytest.raises(ValueError, match=r"into 7 x 5 tokens"):
        navit.pack(images, patch_size=8, max_tokens=3, row_tokens=5)
    navit.pack(images[:6], patch_size=8, max_tokens=3, row_tokens=5)


SAMPLE = str(Path(__file__).parents[2] / "data" / "sample")


def test_evaluation_on_the_training_images_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="navit"):
        source = open_eval_source(DataConfig(train=Synthetic(size=5), eval=None))
    assert len(source) == 5
    assert "data.eval" in caplog.text


def test_the_eval_part_of_a_split_needs_no_second_path():
    train, held = (Folder(split=s, holdout=0.4) for s in ("train", "eval"))
    train = dataclasses.replace(train, path=SAMPLE, table="captions.csv")
    part, rest = (
        open_eval_source(DataConfig(train=train, eval=held)),
        open_source(train),
    )
    names = [{s.name(i) for i in range(len(s))} for s in (part, rest)]
    assert names[0].isdisjoint(names[1])
    assert len(names[0] | names[1]) == 17
    # And a path of its own is used.
    own = DataConfig(train=train, eval=Synthetic(size=3))
    assert len(open_eval_source(own)) == 3


@pytest.mark.parametrize("written", ["slash", "dots", "table", "link"])
def test_parts_of_one_folder_have_one_holdout_however_it_is_written(written, tmp_path):
    path, table = SAMPLE, ""
    if written == "slash":
        path += "/"
    elif written == "dots":
        path += "/../sample"
    elif written == "table":
        table = "captions.csv"
    else:
        path = str(tmp_path / "link")
        Path(path).symlink_to(SAMPLE)
    train = Folder(SAMPLE, split="train", holdout=0.2)
    held = Folder(path, table, split="eval", holdout=0.6)
    with pytest.raises(ValueError, match=r"holdout=0.2 and data.eval.holdout=0.6"):
        open_eval_source(DataConfig(train=train, eval=held))
    assert open_eval_source(
        DataConfig(train=train, eval=dataclasses.replace(held, holdout=0.2))
    )


def test_training_on_the_part_that_is_evaluated_is_refused():
    train = Folder(SAMPLE, split="eval")
    with pytest.raises(ValueError, match=r"train.split=eval and data.eval.split=eval"):
        open_eval_source(DataConfig(train=train, eval=Folder(split="eval")))


@pytest.mark.parametrize(
    ("workers", "steps", "processes", "batches"),
    [(0, 100, 1, 6), (3, 100, 1, 8), (0, 2, 1, 2), (0, 100, 2, 3)],
)
def test_batches_beyond_the_free_memory_are_refused(
    workers, steps, processes, batches, monkeypatch
):
    """Up to the last byte, they are not."""
    needed = batches * 2 * 48 * 768
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    check_memory(config(steps, workers=workers), processes)
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"data.rows=2 x data.row_tokens=48.* lower"):
        check_memory(config(steps, workers=workers), processes)


@pytest.fixture(scope="module")
def one_run() -> list[Batch]:
    return batches(config())


def test_batches_match_the_plan_and_the_source(one_run):
    cfg = config()
    source = open_source(cfg.data.train)
    assert len(one_run) == STEPS
    for batch in one_run:
        PackedImages(*batch.images).check()
        batch.check()
        assert batch.images.patches.shape == (2, 48, 768)
        assert batch.text.shape == (2, 4, 24)
        for array in [*batch.images[1:], batch.text, batch.label, batch.size]:
            assert array.dtype == np.int32
        assert batch.id.dtype == np.int64
        empty = batch.id < 0
        np.testing.assert_array_equal(empty, batch.images.grids.prod(-1) == 0)
        assert not batch.text[empty].any() and not batch.size[empty].any()
        assert (batch.label[empty] == -1).all()
        for row, slot in np.argwhere(~empty):
            index = int(batch.id[row, slot])
            assert tuple(batch.size[row, slot]) == tuple(source.sizes[index])
            assert batch.label[row, slot] == source.tasks["coarse"].labels[index]
            texts = encode(source.record(index).captions, 24).tolist()
            assert batch.text[row, slot].tolist() in texts
            rows, columns = batch.images.grids[row, slot].tolist()
            expected = np.zeros((rows * columns, 768), np.uint8)
            image = pixels.load(read_image(source, index), rows * 16, columns * 16)
            pixels.to_patches(image, 16, expected)
            mine = batch.images.segment_ids[row] == slot + 1
            np.testing.assert_array_equal(batch.images.patches[row, mine], expected)


@pytest.mark.parametrize("start", [1, 5, STEPS])
def test_a_run_continues_with_the_same_batches(one_run, start):
    assert_same(batches(config(), start_step=start), one_run[start:])


def test_workers_give_the_same_batches_and_end_quietly(one_run, capfd):
    source = open_source(config().data.train)
    iterator = train_batches(config(workers=2), source, start_step=3)
    assert_same([next(iterator) for _ in range(3)], one_run[3:6])
    # Abandoned before its end, as in a run that gets a signal.
    close = getattr(iterator, "close", None)
    if close:
        close()
    del iterator, close
    gc.collect()
    assert capfd.readouterr().err == ""


def test_workers_that_start_ignore_ctrl_c(one_run):
    told, ended = set(), threading.Event()

    def tell():
        while not ended.wait(0.001):
            for child in multiprocessing.active_children():
                if child.pid and child.pid not in told:
                    told.add(child.pid)
                    os.kill(child.pid, signal.SIGINT)

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        assert_same(batches(config(workers=2)), one_run)
    finally:
        ended.set()
        teller.join()
    assert len(told) == 2


RICH = dict(
    budgets=(9, 16),
    crop=Crop(),
    flip=True,
    drop=TokenDrop(kind="beta", rate=0.3, final_rate=0.3),
    elastic=0.1,
    rows=4,
)


@pytest.mark.parametrize("hosts", [2, 4])
def test_every_draw_is_the_same_on_any_number_of_hosts_and_after_any_step(hosts):
    whole = batches(config(**RICH))
    for i in range(hosts):
        mine = batches(
            config(**RICH), start_step=2, process_index=i, process_count=hosts
        )
        rows = slice(4 // hosts * i, 4 // hosts * (i + 1))
        expected = [
            Batch(
                PackedImages(*(x[rows] for x in batch.images)),
                *(x[rows] for x in batch[1:]),
            )
            for batch in whole[2:]
        ]
        assert_same(mine, expected)
    plain = batches(config(rows=4))
    assert (whole[0].images.patches != plain[0].images.patches).any()


def test_every_draw_is_the_same_in_a_worker():
    iterator = train_batches(config(**RICH, workers=1), open_source(Synthetic(40, 2)))
    with contextlib.closing(iterator):
        found = [next(iterator) for _ in range(3)]
    assert_same(found, batches(config(**RICH))[:3])


def test_the_rows_of_two_hosts_are_the_batch_of_one(one_run):
    hosts = [batches(config(), process_index=i, process_count=2) for i in range(2)]
    together = [
        Batch(
            PackedImages(*map(np.concatenate, zip(a.images, b.images, strict=True))),
            *map(np.concatenate, zip(a[1:], b[1:], strict=True)),
        )
        for a, b in zip(*hosts, strict=True)
    ]
    assert_same(together, one_run)


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_captions_of_a_group_of_rows_are_one_list(hosts):
    rich = config(**RICH | dict(rows=8, slots=8, caption_rows=4))
    source = open_source(rich.data.train)
    each = [batches(rich, process_index=i, process_count=hosts) for i in range(hosts)]
    places = BatchPlans(source.sizes, rich.data, patch_size=16, steps=1).captions
    assert places < 32
    for batch in itertools.chain(*each):
        assert batch.images.grids.shape == (8 // hosts, 8, 2)
        assert batch.text.shape == (2 // hosts, places, 24)
        for ids, texts in zip(batch.id.reshape(-1, 32), batch.text, strict=True):
            ids = ids[ids >= 0]
            for index, found in zip(ids, texts, strict=False):
                captions = source.record(int(index)).captions
                assert found.tolist() in encode(captions, 24).tolist()
            assert not texts[len(ids) :].any()
    together = map(
        np.concatenate, zip(*([b.text for b in x] for x in each), strict=True)
    )
    for text, batch in zip(together, batches(rich), strict=True):
        np.testing.assert_array_equal(text, batch.text)


class OneBroken(SyntheticSource):
    """The synthetic images, except one that is not an image."""

    broken = 7

    def record(self, index: int) -> Record:
        record = super().record(index)
        return record._replace(image=b"garbage") if index == self.broken else record


def test_an_unreadable_image_leaves_its_slot_empty_and_the_rest_as_it_was(
    one_run, caplog
):
    with caplog.at_level(logging.WARNING, logger="navit"):
        got = batches(config(), OneBroken(size=40, seed=2))
    met = 0
    for batch, whole in zip(got, one_run, strict=True):
        PackedImages(*batch.images).check()
        batch.check()
        for row, slot in np.argwhere(whole.id == OneBroken.broken):
            met += 1
            mine = whole.images.segment_ids[row] == slot + 1
            # The batch loses exactly this image.
            images = PackedImages(*map(np.copy, whole.images))
            for array in images[:3]:
                array[row, mine] = 0
            images.grids[row, slot] = 0
            whole = whole._replace(images=images)
            assert batch.id[row, slot] == OneBroken.broken
        assert_same([batch], [whole])
    assert met > 1  # read in several epochs, and named once
    (record,) = caplog.records
    assert OneBroken(size=40).name(OneBroken.broken) in record.getMessage()


class OneSilent(SyntheticSource):
    """The synthetic images, except one whose record can no longer be read."""

    def record(self, index: int) -> Record:
        if index == OneBroken.broken:
            raise OSError("the shard ends here")
        return super().record(index)


def test_a_record_that_cannot_be_read_leaves_its_slot_empty(one_run):
    found = batches(config(), OneSilent(size=40, seed=2))
    for batch, whole in zip(found, one_run, strict=True):
        lost = whole.id == OneBroken.broken
        assert (batch.images.grids[lost] == 0).all()
        np.testing.assert_array_equal(
            batch.images.grids[~lost], whole.images.grids[~lost]
        )


class FarSizes:
    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.full((len(index), 2), 16)


class Far(SyntheticSource):
    """A source of more images than 31 bits can count."""

    def __init__(self) -> None:
        self.sizes, self.tasks = FarSizes(), {}

    def record(self, index: int) -> Record:
        return Record(solid(16, 16), (f"image {index}",))


def test_ids_beyond_31_bits_stay_as_they_are():
    ids = np.array([2**31 - 1, 2**31, 2**40])
    rows = Rows(np.array([0, 2, 3]), ids, np.ones((3, 2), np.int32))
    options = dict(
        patch_size=16,
        slots=2,
        captions=2,
        text_tower=TextConfig(length=24),
        named=set(),
    )
    batch = MakeBatch(Far(), config().data, **options).map(rows)
    assert batch.id.tolist() == [ids[:2].tolist(), [2**40, -1]]


class AllGone(SyntheticSource):
    def record(self, index: int) -> Record:
        raise OSError("input/output error")


def test_storage_that_is_gone_stops_the_run():
    with pytest.raises(OSError, match=r"not one of the \d+ images of a batch"):
        batches(config(rows=8), AllGone(size=80, seed=2))


@pytest.mark.parametrize(
    "position",
    [
        PositionConfig(kind="learned_1d", size=15),
        PositionConfig(kind="learned_2d", size=3),
    ],
)
def test_a_position_table_too_small_is_refused_before_any_decode(position):
    class Closed(SyntheticSource):
        def record(self, index):
            raise MemoryError("a record was read")

    vision = VisionConfig(position=position)
    data = config().data
    cfg = Config(model=ModelConfig(vision=vision), data=data)
    with pytest.raises(ValueError, match=f"ends at {position.size}"):
        train_batches(cfg, Closed(size=40))


def test_crops_of_whole_pixels_reach_a_little_farther_than_their_aspect():
    class Wide(SyntheticSource):
        def __init__(self) -> None:
            super().__init__(40)
            self.sizes = np.full((40, 2), (100, 400), np.int32)

    for size, fits in ((16, False), (20, True)):
        position = PositionConfig(kind="learned_2d", size=size)
        cfg = Config(
            model=ModelConfig(vision=VisionConfig(position=position)),
            data=DataConfig(budgets=(64,), crop=Crop()),
        )
        if fits:
            train_batches(cfg, Wide()).close()
        else:
            with pytest.raises(ValueError, match="ends at 16"):
                train_batches(cfg, Wide())


class Own:
    """The members of a source, on no class of navit."""

    left_out = damaged = 0

    def __init__(self, source) -> None:
        self.sizes, self.tasks, self.record = source.sizes, source.tasks, source.record
        self.name, self.fingerprint = source.name, source.fingerprint
        self.version = source.version

    def __len__(self) -> int:
        return len(self.sizes)


def test_batches_come_from_the_config_or_from_a_source_of_your_own():
    cfg = config(steps=3)
    expected = batches(cfg, open_source(cfg.data.train))
    for source in (None, Own(open_source(cfg.data.train))):
        made = list(navit.train_batches(cfg, source))
        for one, other in zip(made, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_rows_that_the_processes_cannot_share_are_refused():
    source = open_source(config().data.train)
    with pytest.raises(ValueError, match=r"rows=2 .* 3 processes"):
        train_batches(config(), source, process_count=3)


def test_a_benchmark_of_no_batches_is_refused():
    with pytest.raises(ValueError, match=r"--batches 0 measures nothing"):
        bench_input.run(config(), 0)


class Plain(SyntheticSource):
    """Only the captions matter, so the images are quick."""

    def record(self, index: int) -> Record:
        return super().record(index)._replace(image=solid(8, 8))


def drawn(cfg: Config) -> dict[tuple[int, int], tuple[int, ...]]:
    """(epoch, id) -> the caption's tokens."""
    source = Plain(size=40, seed=2)
    plans = BatchPlans(source.sizes, cfg.data, patch_size=16, steps=cfg.train.steps)
    found = {}
    for step, batch in enumerate(batches(cfg, source)):
        for row, slot in np.argwhere(batch.id >= 0):
            key = step // plans.steps_per_epoch, int(batch.id[row, slot])
            found[key] = tuple(batch.text[row, slot].tolist())
    return found


def test_the_caption_drawn_depends_only_on_seed_epoch_and_id():
    one = drawn(config(30))
    otherwise = drawn(config(12, budgets=(9,), rows=4, slots=8, row_tokens=60))
    shared = one.keys() & otherwise.keys()
    assert {epoch for epoch, _ in shared} >= {0, 1}
    assert all(one[key] == otherwise[key] for key in shared)
    # And it does change with the epoch, and with the seed.
    first, second = ({i: one[e, i] for e, i in one if e == epoch} for epoch in (0, 1))
    assert any(first[i] != second[i] for i in first.keys() & second.keys())
    seeded = drawn(config(30, seed=1))
    assert any(one[key] != seeded[key] for key in one.keys() & seeded.keys())


def planned(images, grids, **draws):
    """Rows of one image each, as a plan would have them."""
    count = len(images)
    arrays = {k: v if k == "epoch" else np.array(v) for k, v in draws.items()}
    rows = Rows(np.arange(count + 1), np.arange(count), np.array(grids), **arrays)
    filled = fill_rows(
        rows,
        lambda i: Record(images[i]),
        patch_size=4,
        row_tokens=12,
        slots=1,
    )
    assert not filled.errors
    return filled.images


def test_planned_boxes_and_flips_reach_the_pixels(rng):
    image = rng.integers(0, 256, (20, 30, 3), np.uint8)
    part = image[4:16, 10:26]  # 3x4 patches
    out = planned(
        [image] * 2,
        [(3, 4)] * 2,
        boxes=[(4, 10, 12, 16)] * 2,
        flips=[False, True],
    )
    wanted = planned([part, part[:, ::-1]], [(3, 4)] * 2)
    np.testing.assert_array_equal(out.patches, wanted.patches)
    assert (out.patches[0] != out.patches[1]).any()


def test_dropped_tokens_leave_the_rest_as_it_is(rng):
    """Kept tokens have their true coordinates and pixels; each epoch draws again."""
    image = rng.integers(0, 256, (12, 16, 3), np.uint8)
    whole = planned([image], [(3, 4)])
    seen = []
    for epoch in range(8):
        out = planned([image], [(3, 4)], kept=[7], epoch=epoch)
        assert out.segment_ids[0].tolist() == [1] * 7 + [0] * 5
        assert out.grids[0].tolist() == [[3, 4]]
        places = (out.coords[0, :7] @ [4, 1]).tolist()
        assert places == sorted(set(places))
        np.testing.assert_array_equal(out.patches[0, :7], whole.patches[0, places])
        seen.append(tuple(places))
        again = planned([image], [(3, 4)], kept=[7], epoch=epoch)
        np.testing.assert_array_equal(out.coords, again.coords)
    assert len(set(seen)) > 4 and {p for places in seen for p in places} == set(
        range(12)
    )
