import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from navit.config import MeshConfig
from navit.model import attention as module
from navit.model.attention import attention, misfit
from navit.sharding import make_mesh, split_rows, use_mesh

IMPLEMENTATIONS = ["xla", "unpack", "blocks"]
# Segments of up to 140 tokens, which "unpack" handles in two ways: all at once, or one
# by one.
BOUNDS = dict(max_segments=5, max_segment_tokens=140)


@pytest.fixture(params=[1, 7])
def row(rng, request):
    """Two rows of 48 tokens: segments of 20, 1 and 13; 7 and 19 with a gap between.

    Also the same rows seven times as long.
    """
    segments = np.zeros((2, 48), np.int32)
    segments[0, :20], segments[0, 20:21], segments[0, 21:34] = 1, 2, 3
    segments[1, :7], segments[1, 9:28] = 1, 4
    segments = segments.repeat(request.param, axis=1)
    q, k, v = rng.normal(size=(3, *segments.shape, 2, 8)).astype(np.float32)
    return q, k, v, segments


@functools.partial(jax.jit, static_argnames=("implementation", *BOUNDS))
def compiled(q, k, v, ids, key_ids=None, *, implementation, **bounds):
    """`attention` as one program: op by op, it compiles many."""
    return attention(
        q, k, v, ids, kv_segment_ids=key_ids, implementation=implementation, **bounds
    )


def naive(q, k, v, segments):
    """Softmax attention of each segment by itself, in float64."""
    q, k, v, segments = (np.asarray(x) for x in (q, k, v, segments))
    out = np.zeros(q.shape)
    for b, s in {(b, s) for b, row in enumerate(segments) for s in row if s}:
        own = segments[b] == s
        for h in range(q.shape[2]):
            logits = q[b, own, h].astype(np.float64) @ k[b, own, h].T
            weights = np.exp(logits / np.sqrt(q.shape[3]))
            out[b, own, h] = weights / weights.sum(-1, keepdims=True) @ v[b, own, h]
    return out


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_equals_attention_of_each_segment_alone(row, implementation):
    out = np.asarray(compiled(*row, implementation=implementation, **BOUNDS))
    real = row[3] > 0
    np.testing.assert_allclose(out[real], naive(*row)[real], atol=2e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_those_of_the_dense_mask(row, implementation):
    q, k, v, segments = row
    weight = (
        np.random.default_rng(1).normal(size=q.shape) * (segments > 0)[..., None, None]
    )

    def total(q, k, v, implementation):
        out = compiled(q, k, v, segments, implementation=implementation, **BOUNDS)
        return (out * weight).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=3)
    found, expected = (gradients(q, k, v, name) for name in (implementation, "xla"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


# The second is near the largest float: its products are infinite or NaN.
POISONS = [lambda x: x * -7e3 + 11, lambda x: np.sign(x) * 3e38]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_leak_between_segments_in_value_or_gradient(row, implementation):
    """No values in segment A or in padding change a bit of segment B."""
    q, k, v, segments = row
    inside = segments[0] == 3

    def attend(q, k, v):
        out = compiled(q, k, v, segments, implementation=implementation, **BOUNDS)
        return out[0, inside]

    gradients = jax.jit(
        jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2))
    )
    attend = jax.jit(attend)
    outside = (segments != 3)[..., None, None]
    before = attend(q, k, v)
    for poisoned in POISONS:
        after = attend(*(np.where(outside, poisoned(x), x) for x in (q, k, v)))
        np.testing.assert_array_equal(before, after)
    for g in map(np.asarray, gradients(q, k, v)):
        assert (g[np.broadcast_to(outside, g.shape)] == 0).all()
        assert np.abs(g[0, inside]).max() > 0


@pytest.mark.parametrize("n", [100, 200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_does_not_leak_into_the_one_segment(implementation, n, rng):
    """Also without gathering, on either path that the length selects."""
    q, k, v = rng.normal(size=(3, 2, n, 2, 8)).astype(np.float32)
    segments = np.arange(n)[None] < np.array([[n - 13], [20]])
    outside = ~segments[..., None, None]

    def attend(q, k, v):
        bounds = dict(max_segments=1, max_segment_tokens=n)
        ids = segments.astype(np.int32)
        return compiled(q, k, v, ids, implementation=implementation, **bounds)

    before = np.asarray(attend(q, k, v))
    for poisoned in POISONS:
        after = attend(*(np.where(outside, poisoned(x), x) for x in (q, k, v)))
        np.testing.assert_array_equal(before[segments], np.asarray(after)[segments])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_order_of_tokens_in_a_row_does_not_matter(row, implementation, rng):
    """A segment need not even be contiguous."""
    order = rng.permutation(row[3].shape[1])
    out = compiled(*row, implementation=implementation, **BOUNDS)
    permuted = [x[:, order] for x in row]
    shuffled = compiled(*permuted, implementation=implementation, **BOUNDS)
    real = permuted[3] > 0
    np.testing.assert_allclose(
        np.asarray(out)[:, order][real], np.asarray(shuffled)[real], atol=2e-6
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_of_four_budgets_in_one_row(implementation):
    """256 + 576 + 729 + 1024 tokens: the visible pairs are the sum of the squares."""
    segments = jnp.asarray(np.repeat([1, 2, 3, 4], [256, 576, 729, 1024])[None])
    assert segments.shape == (1, 2585)
    # With zero queries all visible tokens weigh the same, and with the identity as
    # values the output is the matrix of weights itself.
    zeros, identity = jnp.zeros((1, 2585, 1, 2585)), jnp.eye(2585)[None, :, None]
    weights = attention(
        zeros,
        zeros,
        identity,
        segments,
        implementation=implementation,
        max_segments=4,
        max_segment_tokens=1024,
    )[0, :, 0]
    assert (weights > 0).sum() == 1_977_329
    same = segments[0, :, None] == segments[0, None, :]
    np.testing.assert_array_equal(weights > 0, same)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_rows_of_one_image_need_no_gathering(row):
    q, k, v, segments = row
    one = np.where(segments == 4, 1, segments) * (segments != 3) * (segments != 2)
    out = compiled(
        q,
        k,
        v,
        one,
        implementation="unpack",
        max_segments=1,
    )
    real = np.asarray(one) > 0
    np.testing.assert_allclose(
        np.asarray(out)[real], naive(q, k, v, one)[real], atol=2e-6
    )


def test_bfloat16_stays_close(row):
    q, k, v, segments = row
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    for implementation in IMPLEMENTATIONS:
        out = compiled(*low, segments, implementation=implementation, **BOUNDS)
        assert out.dtype == jnp.bfloat16
        real = np.asarray(segments) > 0
        error = np.abs(np.asarray(out, np.float32) - naive(*row))[real]
        assert error.max() < 0.05


def test_no_segments_is_plain_attention(row):
    q, k, v, _ = row
    ones = np.ones(row[3].shape, np.int32)
    np.testing.assert_allclose(
        compiled(q, k, v, None, implementation=None),
        compiled(q, k, v, ones, implementation="xla"),
        atol=1e-6,
    )


def test_errors_name_what_is_wrong(row):
    row = [jnp.asarray(x) for x in row]
    with pytest.raises(ValueError, match="'splosh' is not one of"):
        attention(*row, implementation="splosh")
    with pytest.raises(ValueError, match="needs max_segments and max_segment_tokens"):
        attention(*row, implementation="unpack")
    q, k, v, segments = row
    with pytest.raises(ValueError, match="need kv_segment_ids"):
        attention(q[:, :5], k, v, segments[:, :5])
    with pytest.raises(ValueError, match="needs the segment_ids of the queries"):
        attention(q, k, v, None, kv_segment_ids=segments)


def test_wrong_shapes_are_errors_that_name_both(row, monkeypatch):
    q, k, v, segments = row
    n = segments.shape[1]
    # Otherwise the annotations refuse them first, which only tests check.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for ids in (segments[:, :5], segments[:1], segments[0]):
        words = rf"segment_ids {re.escape(str(ids.shape))} and queries \(2, {n}, 2, 8\)"
        with pytest.raises(ValueError, match=f"^{words}"):
            attention(q, k, v, ids)
    with pytest.raises(
        ValueError, match=rf"kv_segment_ids \(2, 5\) and keys \(2, {n},"
    ):
        attention(q, k, v, segments, kv_segment_ids=segments[:, :5])
    with pytest.raises(ValueError, match=r"q \(2, 0, 2, 8\) .* at least one token"):
        attention(q[:, :0], k, v, segments[:, :0], kv_segment_ids=segments)
    with pytest.raises(ValueError, match=r"k \(2, 0, 2, 8\) need at least one token"):
        attention(q, k[:, :0], v[:, :0], segments, kv_segment_ids=segments[:, :0])


def test_kernels_refuse_shapes_with_the_values_and_the_remedy():
    assert misfit("xla", 100, 8, "cpu") is misfit("splash", 128, 16, "tpu") is None
    assert "multiple of 128 tokens" in misfit("splash", 100, 16, "tpu")
    assert "not 128 and 24" in misfit("splash_skip", 128, 24, "tpu")
    assert "up to 1152 tokens, not 1280" in misfit("splash", 1280, 16, "tpu")
    assert "this runs on a gpu" in misfit("splash", 128, 16, "gpu")
    assert "GPU kernel, and this runs on a tpu" in misfit("flash", 128, 16, "tpu")


def test_rows_that_a_kernel_does_not_take_get_the_usual_choice(monkeypatch, caplog):
    """As in an evaluation at 729 tokens after training with `splash`."""
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    x = jnp.zeros((1, 729, 2, 8))
    ids = jnp.ones((1, 729), jnp.int32)
    attention(x, x, x, ids, implementation="splash")
    assert "takes a multiple of 128 tokens" in caplog.text
    assert "Using the usual choice" in caplog.text
    with pytest.raises(ValueError, match=r"flash.* and this runs on a tpu: use None"):
        attention(x, x, x, ids, implementation="flash")


@pytest.fixture(params=["many segments", "one segment"])
def crossed(row, rng, request):
    """Queries `[2, 40]` to the row's keys: in other orders and numbers.

    Segment 3 of row 0 has more queries than keys, and segment 2 of row 1 has no keys.
    With one segment: row 1 has no keys, only padding.
    """
    _, k, v, key_ids = row
    ids = np.zeros((2, 160), np.int32)
    if request.param == "many segments":
        ids[0, :100], ids[0, 100:105], ids[0, 110:117] = 3, 2, 1
        ids[1, 3:9], ids[1, 12:15], ids[1, 20:30] = 4, 2, 1
        bounds = BOUNDS
    else:
        ids[0, :31], ids[1, 4:9] = 1, 1
        key_ids = (key_ids == 1).astype(np.int32)
        key_ids[1] = 0
        bounds = dict(max_segments=1, max_segment_tokens=key_ids.shape[1])
    q = rng.normal(size=(*ids.shape, 2, 8)).astype(np.float32)
    return q, k, v, ids, key_ids, bounds


def cross(implementation, ids, key_ids, bounds):
    """Attention from q to k and v, in one compiled function."""
    return jax.jit(
        lambda q, k, v: compiled(
            q, k, v, ids, key_ids, implementation=implementation, **bounds
        )
    )


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_cross_attention_equals_each_pair_alone(crossed, implementation):
    q, k, v, ids, key_ids, bounds = crossed
    found = np.asarray(cross(implementation, ids, key_ids, bounds)(q, k, v))
    for b, s in {(b, int(s)) for b, row in enumerate(ids) for s in row if s}:
        own, keys = ids[b] == s, key_ids[b] == s
        if not keys.any():
            assert (found[b, own] == 0).all()
            continue
        pair = (q[b : b + 1, own], k[b : b + 1, keys], v[b : b + 1, keys])
        expected = compiled(*pair, None, implementation=None)[0]
        np.testing.assert_allclose(found[b, own], expected, atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_does_not_leak(crossed, implementation):
    """Only a segment's own keys reach its queries; without keys nothing does."""
    q, k, v, ids, key_ids, bounds = crossed
    attend = cross(implementation, ids, key_ids, bounds)

    @jax.jit
    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def gradients(own, q, k, v):
        return jnp.where(own, attend(q, k, v) ** 2, 0).sum()

    for b, s in {(b, int(s)) for b, row in enumerate(ids) for s in row if s}:
        own, keys = np.zeros(ids.shape, bool), np.zeros(key_ids.shape, bool)
        own[b], keys[b] = ids[b] == s, key_ids[b] == s
        inside = own[..., None, None], keys[..., None, None], keys[..., None, None]
        before = np.asarray(attend(q, k, v))
        for poisoned in POISONS:
            mixed = [
                np.where(i, x, poisoned(x))
                for i, x in zip(inside, (q, k, v), strict=True)
            ]
            after = np.asarray(attend(*mixed))
            np.testing.assert_array_equal(before[own], after[own])
        for g, i in zip(gradients(inside[0], q, k, v), inside, strict=True):
            g = np.asarray(g)
            assert (g[np.broadcast_to(~i, g.shape)] == 0).all()
            if keys.sum() != 1:  # the weight of an only key is 1, whatever the query
                assert (g != 0).any() == keys.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_to_the_same_segments_is_self_attention(row, implementation):
    q, k, v, ids = row
    own = compiled(q, k, v, ids, implementation=implementation, **BOUNDS)
    crossed = compiled(q, k, v, ids, ids, implementation=implementation, **BOUNDS)
    np.testing.assert_array_equal(own, crossed)


def test_cross_attention_on_two_devices_equals_that_on_one(crossed):
    """Rows are split over devices, and so are both kinds of segment ids."""
    q, k, v, ids, key_ids, bounds = crossed
    mesh, rules = make_mesh(MeshConfig(data=2, fsdp=1))
    for implementation in IMPLEMENTATIONS:
        expected = cross(implementation, ids, key_ids, bounds)(q, k, v)
        with use_mesh(mesh):
            split = split_rows((q, k, v, ids, key_ids), rules)
            out = cross(implementation, *split[3:], bounds)(*split[:3])
        assert jax.typeof(out).sharding.spec[0] == rules.batch
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize(
    "where, implementation",
    [("tpu", "splash"), ("tpu", "splash_skip"), ("tpu", None), ("gpu", "flash")],
)
def test_cross_attention_on_an_accelerator_takes_the_dense_mask(
    crossed, monkeypatch, where, implementation
):
    """Its kernels read queries and keys of one length from one array."""
    q, k, v, ids, key_ids, bounds = crossed

    ids, key_ids = jnp.asarray(ids), jnp.asarray(key_ids)

    def run(implementation):  # a new trace: the platform may have changed
        return jax.jit(
            lambda q, k, v: attention(
                q,
                k,
                v,
                ids,
                kv_segment_ids=key_ids,
                implementation=implementation,
                **bounds,
            )
        )(q, k, v)

    expected = run("xla")
    monkeypatch.setattr("navit.model.attention.platform", lambda: where)
    np.testing.assert_array_equal(run(implementation), expected)
