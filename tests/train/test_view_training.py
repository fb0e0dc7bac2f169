"""Training with a resolution strategy: an image's views count as one image."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

import navit
from navit import strategies
from navit.batch import PackedImages
from navit.config import override
from navit.input import pipeline
from navit.input.tokens import encode
from navit.model.two_tower import TwoTower, normalize
from navit.train.metrics import Meter
from navit.train.step import batch_loss, by_owner

PATCH, GROUP = 4, 2
STEPS = 6


TILES = ("internvl:16", "data.strategy.max_tiles=6")


def make_config(*options: str, strategy: tuple[str, ...] = TILES):
    """Images of one to seven views, in groups of 2 rows of 64 tokens."""
    shared = [
        "mesh.data=1",
        "model.vision.depth=1",
        "model.vision.num_classes=7",
        f"model.vision.patch_size={PATCH}",
        f"data.strategy={strategy[0]}",
        f"data.strategy.patch={PATCH}",
        *strategy[1:],
        "data.budgets=256",
        "data.max_upscale=none",
        "data.row_tokens=64",
        "data.rows=8",
        "data.slots=6",
        f"data.caption_rows={GROUP}",
        "data.train.size=40",
        f"train.steps={STEPS}",
        "train.losses=sigmoid,classification:0.5",
    ]
    return override(tiny_config(), [*shared, *options])


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def batches(config):
    return list(pipeline.train_batches(config))


@pytest.fixture(scope="module")
def model(config):
    return TwoTower(config.model, rngs=nnx.Rngs(0))


def image_of(batch) -> np.ndarray:
    """The image of each slot, `[b, s]`, numbered through all groups; -1 = empty."""
    group = np.arange(len(batch.owner))[:, None] // GROUP
    numbered = group * batch.text.shape[1] + batch.owner
    return np.where(batch.owner >= 0, numbered, -1)


def alone(batch) -> tuple[PackedImages, np.ndarray]:
    """Every view in a row of its own, and the image of each row."""
    rows, images = [], image_of(batch)
    packed = batch.images
    for row, slot in np.argwhere(packed.grids[..., 0] > 0):
        own = packed.segment_ids[row] == slot + 1
        count = own.sum()
        one = [np.zeros_like(x[row]) for x in packed[:3]]
        for to, values in zip(one, packed[:3], strict=True):
            to[:count] = values[row][own]
        one[1][:count] = 1
        rows.append(PackedImages(*one, packed.grids[row, slot : slot + 1]))
    return PackedImages(*map(np.stack, zip(*rows, strict=True))), images[images >= 0]


def test_the_loss_and_its_gradients_are_those_of_views_encoded_alone(
    config, batches, model
):
    batch = batches[0]
    images = image_of(batch)
    assert max(np.unique(images[images >= 0], return_counts=True)[1]) > 1
    views, owner = alone(batch)
    tokens = views.grids.prod(-1)[:, 0]
    groups, places, _ = batch.text.shape
    one_hot = owner == np.arange(groups * places)[:, None]
    weights = one_hot * tokens / np.maximum((one_hot * tokens).sum(1), 1)[:, None]
    real = one_hot.any(1)
    label = np.full(len(real), -1)
    label[owner] = batch.label[images >= 0]

    def expected(model):
        out = model.vision(views)
        pooled = normalize(weights @ out.pooled[:, 0])
        text = normalize(model.text(batch.text.reshape(groups * places, -1)))
        logits = jnp.exp(model.scale[...]) * pooled @ text.T + model.bias[...]
        signs = 2 * jnp.eye(len(real)) - 1
        pairs = jax.nn.softplus(-signs * logits) * real * real[:, None]
        classes = jax.nn.log_softmax(weights @ out.logits[:, 0])
        wrong = -classes[np.arange(len(real)), np.maximum(label, 0)]
        count = real.sum()
        return pairs.sum() / count + 0.5 * (wrong * real).sum() / count

    def found(model):
        return batch_loss(model, jax.tree.map(jnp.asarray, batch), config)[0]

    value, gradients = jax.jit(jax.value_and_grad(expected))(model)
    value_found, gradients_found = jax.jit(jax.value_and_grad(found))(model)
    np.testing.assert_allclose(value_found, value, rtol=1e-5)
    leaves = [jax.tree.leaves(x) for x in (gradients_found, gradients)]
    for a, b in zip(*leaves, strict=True):
        atol = 2e-5 * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def test_nothing_of_one_view_reaches_another_view_or_image(config, batches, model):
    batch = jax.tree.map(jnp.asarray, batches[0])
    images = image_of(batches[0])
    row, slot = np.argwhere(images == images.max())[0]
    floats = batch.images.patches.astype(jnp.float32) / 127.5 - 1

    def per_slot(patches):
        return model.vision(batch.images._replace(patches=patches)).pooled

    def per_image(patches):
        return by_owner(per_slot(patches), batch)[0]

    own = batch.images.segment_ids[row] == slot + 1
    changed = floats.at[row].set(jnp.where(own[:, None], -floats[row], floats[row]))
    run = jax.jit(lambda x: (per_slot(x), per_image(x)))
    before, after = run(floats), run(changed)
    other = np.ones(images.shape, bool)
    other[row, slot] = False
    differs = np.asarray(before[0] != after[0]).any(-1)
    assert differs[row, slot] and not differs[other].any()
    differs = np.asarray(before[1] != after[1]).any(-1)
    assert np.flatnonzero(differs).tolist() == [images[row, slot]]

    gradient = jax.jit(jax.grad(lambda x: per_image(x)[images[row, slot]].sum()))
    reached = np.asarray(gradient(floats) != 0).any(-1)
    segments = np.asarray(batch.images.segment_ids)
    own_views = [
        (segments[r] == s + 1) * (np.arange(len(images)) == r)[:, None]
        for r, s in np.argwhere(images == images[row, slot])
    ]
    assert reached.any() and not reached[~np.any(own_views, 0)].any()


def test_a_run_resumes_and_is_shared_by_hosts_and_workers(config, batches):
    def same(a, b):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)

    same(list(pipeline.train_batches(config, start_step=4)), batches[4:])
    halves = [
        list(pipeline.train_batches(config, process_index=i, process_count=2))
        for i in range(2)
    ]
    for step, batch in enumerate(batches):
        parts = [half[step] for half in halves]
        same(jax.tree.map(lambda *x: np.concatenate(x), *parts), batch)


def test_each_image_has_one_caption_and_is_counted_once(config, batches):
    source = pipeline.open_source(config.data.train)
    meter = Meter(config, 1)
    images = 0
    for batch in batches:
        batch.check()
        meter.add(batch, 0.0)
        owned = image_of(batch)
        ids = {}
        for image, index in zip(owned[owned >= 0], batch.id[owned >= 0], strict=True):
            assert ids.setdefault(int(image), int(index)) == index
        assert len({*ids.values()}) == len(ids)  # no image has two captions
        images += len(ids)
        strategy = config.data.strategy
        texts = batch.text.reshape(-1, batch.text.shape[-1])
        for image, index in ids.items():
            captions = source.record(index).captions
            length = config.model.text.length
            assert texts[image].tolist() in encode(captions, length).tolist()
            views = strategy.views(*source.sizes[index].tolist())
            assert (owned == image).sum() == len(views)
    assert meter.read(STEPS)["images_per_step"] == round(images / STEPS, 2)


def test_a_batch_has_the_pixels_that_pack_has(config, batches):
    source = pipeline.open_source(config.data.train)
    batch = batches[0]
    for index in np.unique(batch.id[batch.id >= 0])[:4].tolist():
        packed = navit.pack(
            [source.record(index).image],
            patch_size=PATCH,
            row_tokens=64,
            strategy=config.data.strategy,
        )
        expected, found = (
            sorted(
                x.patches[row][x.segment_ids[row] == slot + 1].tobytes()
                for row, slot in np.argwhere(chosen)
            )
            for x, chosen in (
                (packed, packed.grids[..., 0] > 0),
                (batch.images, batch.id == index),
            )
        )
        assert found == expected


def test_the_model_and_the_strategy_must_agree_on_the_patch():
    with pytest.raises(ValueError, match="patches of 8 pixels, and the model takes 4"):
        make_config("model.vision.patch_size=4", "data.strategy.patch=8")


def test_images_that_do_not_fit_are_named_at_the_start(caplog):
    config = make_config("data.caption_rows=1")
    next(iter(pipeline.train_batches(config)))
    assert re.search(r"\d+ of 40 images do not fit, such as ", caplog.text)
    assert "raise data.caption_rows" in caplog.text
    with pytest.raises(ValueError, match=r"no image of data\.train fits"):
        pipeline.train_batches(make_config("data.row_tokens=15"))


def test_strategies_of_one_view_train_like_images():
    config = make_config(
        strategy=("qwen", "data.strategy.min_pixels=64", "data.strategy.max_pixels=900")
    )
    assert isinstance(config.data.strategy, strategies.QwenVL)
    for batch in pipeline.train_batches(config):
        filled = batch.owner >= 0
        assert filled.any() and len({*image_of(batch)[filled]}) == filled.sum()
