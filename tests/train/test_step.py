"""navit.train.step: the loss of a batch with lists of captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

from navit.batch import Batch
from navit.config import Config, MeshConfig, ModelConfig, override
from navit.input import pipeline
from navit.input.tokens import encode
from navit.model.two_tower import TwoTower
from navit.sharding import make_mesh, split_rows, use_mesh
from navit.train.step import batch_loss, by_owner

GROUP = 2


PAIRS = "train.losses=sigmoid,softmax:0.5"
BOTH = "train.losses=sigmoid:0.5,softmax:0.25,classification:3"


def make_config(*options: str) -> Config:
    """Rows of 6 slots, 16 of them, of which the last are empty."""
    shared = [
        "mesh.data=1",
        "model.vision.depth=1",
        "model.vision.num_classes=7",
        "data.rows=16",
        "data.slots=6",
        f"data.caption_rows={GROUP}",
        "data.train.size=40",
    ]
    return override(tiny_config(), [*shared, *options])


@pytest.fixture(scope="module")
def batch() -> Batch:
    config = make_config()
    source = pipeline.open_source(config.data.train)
    batch = next(iter(pipeline.train_batches(config, source)))
    # One image could not be read; its caption keeps its place.
    grids, segment_ids = batch.images.grids.copy(), batch.images.segment_ids.copy()
    grids[1, 0] = 0
    segment_ids[1][segment_ids[1] == 1] = 0
    images = batch.images._replace(grids=grids, segment_ids=segment_ids)
    return batch._replace(images=images)


def per_slot(batch: Batch) -> Batch:
    """The same batch with a caption for every slot."""
    slots = np.arange(batch.id.shape[1], dtype=np.int32)
    owner = np.where(batch.id >= 0, slots, -1)
    text = np.zeros((*batch.id.shape, batch.text.shape[-1]), np.int32)
    for group, texts in enumerate(batch.text):
        rows = slice(GROUP * group, GROUP * (group + 1))
        planned = np.argwhere(batch.id[rows] >= 0)
        for (row, slot), tokens in zip(planned, texts, strict=False):
            text[rows][row, slot] = tokens
    return batch._replace(text=text, owner=owner)


@functools.cache
def initial_model(model: ModelConfig, mesh: MeshConfig) -> TwoTower:
    devices, rules = make_mesh(mesh)
    with use_mesh(devices):
        return jax.jit(lambda: TwoTower(model, rules, rngs=nnx.Rngs(0)))()


def loss_and_gradients(config: Config, batch: Batch):
    """The loss with each of its parts by name, and the gradients of the loss."""
    model = initial_model(config.model, config.mesh)
    mesh, rules = make_mesh(config.mesh)

    @jax.jit
    def step(model, batch):
        value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
        return value_and_grad(model, batch, config, rules)

    with use_mesh(mesh):
        return jax.tree.map(np.asarray, step(model, split_rows(batch, rules)))


@pytest.fixture(scope="module")
def of_pairs(batch):
    return loss_and_gradients(make_config(PAIRS), batch)


@pytest.fixture(scope="module")
def of_both(batch):
    return loss_and_gradients(make_config(BOTH), batch)


def assert_equal_but_for_rounding(found, expected):
    """Within 8 float32 epsilons of each array's largest element.

    An element is a sum of many terms, and a small one is what is left of terms as large
    as the largest element. The processor decides their order, and so the last digits.
    """
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = 1e-6 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol)


def test_a_list_of_captions_has_the_losses_and_gradients_of_all_slots(batch, of_pairs):
    slots = per_slot(batch)
    assert (batch.id >= 0).sum() == 40 and batch.text.any(-1).sum() == 40
    places = np.prod(batch.text.shape[:2])
    assert places < 0.8 * np.prod(slots.text.shape[:2])
    assert_equal_but_for_rounding(
        of_pairs, loss_and_gradients(make_config(PAIRS), slots)
    )
    sharded = make_config(PAIRS, "mesh.data=2", "mesh.fsdp=2")
    assert_equal_but_for_rounding(loss_and_gradients(sharded, batch), of_pairs)


def test_losses_and_their_gradients_are_summed_by_weight(batch, of_pairs, of_both):
    config = make_config("train.losses=classification", "data.caption_rows=none")
    terms = of_pairs, loss_and_gradients(config, batch)
    for (value, _), gradients in terms:
        assert value > 0 and any(x.any() for x in jax.tree.leaves(gradients))
    pairs, classification = [(value, gradients) for (value, _), gradients in terms]
    expected = jax.tree.map(lambda a, b: 0.5 * a + 3 * b, pairs, classification)
    (value, _), gradients = of_both
    assert_equal_but_for_rounding((value, gradients), expected)


def test_microbatches_have_the_loss_and_gradients_of_the_whole(batch, of_both):
    for options in (
        ["train.microbatches=4"],
        ["mesh.data=2", "mesh.fsdp=2", "train.microbatches=2"],
    ):
        found = loss_and_gradients(make_config(BOTH, *options), batch)
        assert_equal_but_for_rounding(found, of_both)


def test_images_and_captions_stay_together(batch):
    pooled = jnp.asarray(batch.id, jnp.float32)[..., None] + jnp.arange(3.0)
    images, real = by_owner(pooled, jax.tree.map(jnp.asarray, batch))
    assert images.shape == (real.size, 3)
    texts = batch.text.reshape(real.size, -1)
    source = pipeline.open_source(make_config().data.train)

    for image, text, there in zip(np.asarray(images), texts, real, strict=True):
        if there:
            assert (
                text.tolist()
                in encode(source.record(int(image[0])).captions, 24).tolist()
            )
    lost = int(batch.id[1, 0])
    ids = np.asarray(images)[:, 0].astype(int)[np.asarray(real)]
    assert sorted({*ids.tolist(), lost}) == sorted(batch.id[batch.id >= 0].tolist())
    assert lost not in ids


def test_slots_with_the_same_owner_are_averaged_by_their_tokens(batch, rng):
    """As the views of one image; a slot's owner may be any caption of its group."""
    pooled = rng.standard_normal((*batch.id.shape, 3)).astype(np.float32)
    owner = rng.integers(-1, 4, batch.id.shape).astype(np.int32)
    places = batch.text.shape[1]
    shared = jax.tree.map(jnp.asarray, batch._replace(owner=owner, id=None))
    found, real = map(np.asarray, by_owner(jnp.asarray(pooled), shared))
    expected = np.zeros((len(batch.text), places, 3), np.float32)
    total = np.zeros((len(batch.text), places))
    for row, slot in np.argwhere(owner >= 0):
        place = row // GROUP, owner[row, slot]
        tokens = batch.images.grids[row, slot].prod()
        expected[place] += tokens * pooled[row, slot]
        total[place] += tokens
    expected /= np.maximum(total, 1)[..., None]
    np.testing.assert_allclose(found, expected.reshape(-1, 3), atol=1e-6)
    np.testing.assert_array_equal(real, total.reshape(-1) > 0)


def test_no_row_leaves_its_device(batch):
    mesh, rules = make_mesh(MeshConfig(data=4, fsdp=2))

    def f(pooled, batch):
        return by_owner(pooled, batch, rules)

    with use_mesh(mesh):
        sharding = jax.NamedSharding(mesh, rules("batch"))
        pooled = jax.device_put(np.ones((16, 6, 8), np.float32), sharding)
        split = split_rows(batch, rules)
        text = jax.jit(f).lower(pooled, split).compile().as_text()
        gradient = jax.jit(jax.grad(lambda *x: f(*x)[0].sum()))
        text += gradient.lower(pooled, split).compile().as_text()
        assert jax.typeof(jax.jit(f)(pooled, split)[0]).sharding.spec[0] is not None
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in text
