import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit.config import MeshConfig
from navit.losses import contrastive as losses
from navit.losses.classification import classification_loss
from navit.sharding import Rules, make_mesh, use_mesh

M, E = 6, 5
REALS = {
    "all": [True] * M,
    "some empty": [True, False, True, True, False, True],
    "one": [False, False, True, False, False, False],
    "none": [False] * M,
}


def unit(rng):
    x = rng.normal(size=(M, E))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def numpy_sigmoid(images, texts, real, scale, bias):
    """Loops over only the real pairs."""
    ids = np.flatnonzero(real)
    total = 0.0
    for i in ids:
        for j in ids:
            logit = np.exp(scale) * images[i] @ texts[j] + bias
            total -= log_sigmoid(logit if i == j else -logit)
    return total / max(len(ids), 1)


def numpy_softmax(images, texts, real, scale, bias):
    del bias
    ids = np.flatnonzero(real)
    if not len(ids):
        return 0.0
    logits = np.exp(scale) * images[ids] @ texts[ids].T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    return (rows.mean() + columns.mean()) / 2


def call(name, images, texts, real, scale, bias):
    if name == "sigmoid":
        return losses.sigmoid_loss(images, texts, real, scale=scale, bias=bias)
    return losses.softmax_loss(images, texts, real, scale=scale)


def numeric_gradient(f, x, step=1e-6):
    """Central differences in float64."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("real", REALS.values(), ids=REALS.keys())
def test_contrastive_losses_equal_numpy_in_value_and_gradient(name, real, rng):
    reference = {"sigmoid": numpy_sigmoid, "softmax": numpy_softmax}[name]
    images, texts, scale, bias = unit(rng), unit(rng), np.log(7.0), np.array(-3.0)
    args = [jnp.asarray(x, jnp.float32) for x in (images, texts, scale, bias)]

    def loss(images, texts, scale, bias):
        return call(name, images, texts, jnp.array(real), scale, bias)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)
    np.testing.assert_allclose(
        value, reference(images, texts, real, scale, bias), rtol=1e-5, atol=1e-6
    )
    points = [images, texts, np.array(scale), bias]
    for k, found in enumerate(gradients):

        def along(x, k=k):
            i, t, s, b = [*points[:k], x, *points[k + 1 :]]
            return reference(i, t, real, s, b)

        np.testing.assert_allclose(
            found, numeric_gradient(along, points[k]), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_contents_of_empty_slots_do_not_matter(name, rng):
    real = jnp.array(REALS["some empty"])
    images, texts = (jnp.asarray(unit(rng), jnp.float32) for _ in range(2))
    junk = jnp.where(real[:, None], 0, 1e3)

    def loss(images, texts):
        return call(name, images, texts, real, jnp.float32(1.0), jnp.float32(-1.0))

    a = jax.value_and_grad(loss, argnums=(0, 1))(images, texts)
    b = jax.value_and_grad(loss, argnums=(0, 1))(images + junk, texts - junk)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_batch_is_zero_with_zero_gradients():
    zeros, none = jnp.zeros((M, E)), jnp.zeros(M, bool)
    for name in ("sigmoid", "softmax"):
        value, gradients = jax.value_and_grad(
            lambda i, t, s, b, name=name: call(name, i, t, none, s, b),
            argnums=(0, 1, 2, 3),
        )(zeros, zeros, jnp.float32(2.3), jnp.float32(-10.0))
        assert value == 0
        assert all((np.asarray(g) == 0).all() for g in gradients)
    value, gradient = jax.value_and_grad(classification_loss)(
        zeros, jnp.full(M, -1), none
    )
    assert value == 0 and (np.asarray(gradient) == 0).all()


IMPLEMENTATIONS = ["dense", "gather", "ring"]


def value_and_gradients(implementation, rng, real, mesh=None):
    """The loss of random pairs, on one device or all, as numpy."""
    rules = Rules()
    if mesh:
        mesh, rules = make_mesh(mesh)
    points = [rng.normal(size=(len(real), E)).astype(np.float32) for _ in range(2)]
    points = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in points]
    numbers = jnp.float32(np.log(7.0)), jnp.float32(-3.0)

    @jax.jit
    def loss(images, texts, scale, bias, real):
        return 3 * losses.sigmoid_loss(
            images,
            texts,
            real,
            scale=scale,
            bias=bias,
            rules=rules,
            implementation=implementation,
        )

    with use_mesh(mesh):
        points, real = jax.device_put((points, np.array(real)), rules("batch"))
        found = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*points, *numbers, real)
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("pairs", [2**22, 7], ids=["whole", "in chunks"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "mesh",
    [None, MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=["one", "data and fsdp", "tensor"],
)
def test_sigmoid_implementations_agree(mesh, implementation, pairs, monkeypatch):
    # Of the 3 or 6 images of a device, some or none are real.
    some = np.random.default_rng(1).random(24) < 0.6
    some[6:12] = some[21:] = False
    monkeypatch.setattr(losses, "_PAIRS", pairs)
    for real in (some, np.zeros(24, bool), np.ones(24, bool)):
        expected = value_and_gradients("dense", np.random.default_rng(0), real)
        rng = np.random.default_rng(0)
        found = value_and_gradients(implementation, rng, real, mesh)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def compiled(implementation, count, monkeypatch, limit=losses._GATHERED):
    """The HLO text of value and gradients on 8 devices, and its temporary bytes."""
    monkeypatch.setattr(losses, "_GATHERED", limit)
    mesh, rules = make_mesh(MeshConfig(data=8))

    def loss(images, texts, real):
        return losses.sigmoid_loss(
            images,
            texts,
            real,
            scale=jnp.float32(1.0),
            bias=jnp.float32(0.0),
            rules=rules,
            implementation=implementation,
        )

    with use_mesh(mesh):
        sharding = jax.NamedSharding(mesh, rules("batch"))
        points = jax.ShapeDtypeStruct((count, 64), jnp.float32, sharding=sharding)
        real = jax.ShapeDtypeStruct((count,), bool, sharding=sharding)
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        found = step.lower(points, points, real).compile()
    return found.as_text(), found.memory_analysis().temp_size_in_bytes


def test_many_texts_use_a_ring_and_no_matrix_of_all_pairs(monkeypatch):
    count = 8192
    texts = count * 64 * 4
    gathered, _ = compiled("auto", count, monkeypatch, texts)
    ring, _ = compiled("auto", count, monkeypatch, texts - 1)
    assert "all-gather" in gathered and "collective-permute" not in gathered
    assert "collective-permute" in ring and "all-gather" not in ring
    pairs = count * count // 8 * 4
    assert compiled("dense", count, monkeypatch)[1] > pairs
    monkeypatch.setattr(losses, "_PAIRS", 2**18)
    assert compiled("gather", count, monkeypatch)[1] < pairs / 2
    assert compiled("ring", count, monkeypatch)[1] < pairs / 4


def test_classification_equals_numpy(rng):
    logits = rng.normal(size=(M, 4)) * 3
    labels = np.array([0, 3, 2, -1, 1, 2])
    real = np.array([True, True, True, True, False, True])
    counted = [0, 1, 2, 5]  # real and labelled

    def reference(logits):
        shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.mean([shifted[i, labels[i]] for i in counted])

    value, gradient = jax.value_and_grad(classification_loss)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(real)
    )
    np.testing.assert_allclose(value, reference(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(reference, logits), atol=1e-5)
