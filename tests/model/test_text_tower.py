import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config

from navit.input.tokens import encode
from navit.model import text
from navit.model.text import Text, captions_beside


@pytest.fixture(scope="module")
def tower():
    return Text(tiny_config().model, rngs=nnx.Rngs(0))


def test_every_position_is_attended_to_padding_too(tower):
    """SigLIP 2 masks nothing: the pooled last position sees the whole text and pads."""
    ids = jnp.asarray(encode(["a red circle"], 24))
    changed = jnp.where(jnp.eye(24, dtype=bool), 77, ids)  # one position in each row
    before, after = (
        jax.jit(Text.__call__)(tower, ids),
        jax.jit(Text.__call__)(tower, changed),
    )
    assert (np.abs(after - before).max(-1) > 1e-6).all()


def test_texts_do_not_see_each_other(tower):
    ids = jnp.asarray(encode(["one", "two", "three"], 24))
    np.testing.assert_allclose(tower(ids)[1:2], tower(ids[1:2]), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda t: (t(ids)[1] ** 2).sum()))(tower)
    table = np.asarray(gradient.embedding[...])
    used = np.isin(np.arange(len(table)), np.asarray(ids[1]))
    assert (table[~used] == 0).all() and np.abs(table[used]).min(-1).max() > 0


def test_captions_side_by_side_equal_captions_alone(tower, monkeypatch):
    """In the layout for TPU kernels: each caption is a segment of a row."""
    ids = jnp.asarray(encode(["one", "two", "three", "four"], 24))
    alone = tower(ids)
    monkeypatch.setattr(text, "captions_beside", lambda count, length: 2)
    np.testing.assert_allclose(tower(ids), alone, atol=1e-6)


@pytest.mark.parametrize(
    "count, length, beside", [(8, 64, 4), (14, 64, 2), (17, 64, 0), (3, 256, 1)]
)
def test_captions_per_row(monkeypatch, count, length, beside):
    assert captions_beside(count, length) == 0  # only on TPUs
    monkeypatch.setattr(text, "platform", lambda: "tpu")
    assert captions_beside(count, length) == beside


def test_wrong_length_is_an_error(tower):
    with pytest.raises(ValueError, match="must have 24 tokens"):
        tower(jnp.zeros((2, 23), jnp.int32))
