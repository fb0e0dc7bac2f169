"""big_vision's layout, run by flax.linen: its names, its shapes, its numbers.

The two towers are stated here as big_vision's models/vit.py, naflex_vit.py and
text_transformer.py are made of linen's layers, so the parameters come out under the
names that its checkpoints have.
"""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import LAYOUTS, pack, restack

import navit

GRIDS = [(1, 40), (23, 7), (5, 5), (9, 31), (3, 85), (16, 16), (1, 1), (65, 2)]
WIDTH, SIDE, PATCH, HEADS, MLP, LENGTH = 30, 5, 3, 3, 53, 9


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        up = nn.gelu(nn.Dense(self.mlp_dim)(x))
        return nn.Dense(x.shape[-1])(up)


class EncoderBlock(nn.Module):
    mlp_dim: int
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        return x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
    depth: int
    mlp_dim: int
    heads: int
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            stack = nn.scan(
                EncoderBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = stack(self.mlp_dim, self.heads, name="encoderblock")(x, None)
        else:
            for i in range(self.depth):
                block = EncoderBlock(self.mlp_dim, self.heads, name=f"encoderblock_{i}")
                x, _ = block(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    mlp_dim: int
    heads: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, WIDTH))
        x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(probe, x)
        return (x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)))[:, 0]


class Image(nn.Module):
    scan: bool
    embed_dim: int | None = None

    @nn.compact
    def __call__(self, patches, grid):
        x = nn.Dense(WIDTH, name="embedding")(patches)
        init = nn.initializers.normal(0.2)
        table = self.param("pos_embedding", init, (SIDE, SIDE, WIDTH))
        resized = jax.image.scale_and_translate(
            table,
            (*grid, WIDTH),
            (0, 1),
            jnp.array([grid[0] / SIDE, grid[1] / SIDE]),
            jnp.zeros(2),
            "bilinear",
            antialias=True,
        )
        x = x + resized.reshape(-1, WIDTH)
        x = Encoder(3, MLP, HEADS, self.scan, name="Transformer")(x)
        pooled = MAPHead(MLP, HEADS)(x)
        if self.embed_dim:
            pooled = nn.Dense(self.embed_dim, name="head")(pooled)
        return pooled, x


class Text(nn.Module):
    scan: bool
    embed_dim: int = WIDTH

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(61, 21)(ids)
        init = nn.initializers.normal(0.2)
        x = x + self.param("pos_embedding", init, (1, LENGTH, 21))
        x = Encoder(2, 37, 3, self.scan)(x)  # linen names it Encoder_0
        return nn.Dense(self.embed_dim, name="head")(x[:, -1])


@pytest.fixture(scope="module", params=[(False, True), (True, False, 22)])
def case(request, tmp_path_factory):
    """A file read by navit, and what linen makes of it: with a head, and without."""
    rng = np.random.default_rng(1)
    scan_image, scan_text, *embed_dim = request.param
    image, text = Image(scan_image, *embed_dim), Text(scan_text, *embed_dim)
    patches = [
        rng.uniform(-1, 1, (1, h * w, PATCH**2 * 3)).astype(np.float32)
        for h, w in GRIDS
    ]
    ids = rng.integers(0, 61, (4, LENGTH))
    make = jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        params = {
            "img": jax.jit(image.init, static_argnums=2)(make, patches[6], GRIDS[6]),
            "txt": jax.jit(text.init)(make, ids),
            "t": np.array([1.3], np.float32),
            "b": np.array([-4.2], np.float32),
        }
        params |= {tower: params[tower]["params"] for tower in ("img", "txt")}
        params = jax.tree.map(  # norms and biases too
            lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32),
            params,
        )
        apply = jax.jit(image.apply, static_argnums=2)
        out = [
            apply({"params": params["img"]}, p, g)
            for p, g in zip(patches, GRIDS, strict=True)
        ]
        texts = jax.jit(text.apply)({"params": params["txt"]}, ids)
    flat = flax.traverse_util.flatten_dict({"params": params}, sep="/")
    file = tmp_path_factory.mktemp("big_vision") / "model.npz"
    np.savez(file, **flat)
    return navit.load(file), flat, patches, ids, out, np.asarray(texts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_equal_big_vision(case, layout):
    """Beyond 64 patches a side too, where its own model gives NaN."""
    model, _, patches, _, out, _ = case
    images = [(p[0], g) for p, g in zip(patches, GRIDS, strict=True)]
    rows = LAYOUTS[layout]
    packed = pack(images, rows, max(map(len, rows)))
    found = model.vision(packed)
    for b, row in enumerate(rows):
        start = 0
        for slot, i in enumerate(row):
            tokens = np.asarray(found.tokens)[b, start : start + len(patches[i][0])]
            np.testing.assert_allclose(tokens, out[i][1][0], atol=5e-5)
            pooled = np.asarray(found.pooled)[b, slot]
            np.testing.assert_allclose(pooled, out[i][0][0], atol=5e-5)
            start += len(patches[i][0])


def test_texts_scale_and_bias_equal_big_vision(case):
    model, flat, _, ids, _, texts = case
    np.testing.assert_allclose(model.text(ids), texts, atol=5e-5)
    t, b = flat["params/t"][0], flat["params/b"][0]
    one = np.ones((1, 1), np.float32)
    np.testing.assert_allclose(model.logits(one, one), [[np.exp(t) + b]], rtol=1e-6)


def test_the_file_is_reproduced_tensor_for_tensor(case, tmp_path):
    """In the public layout: the image tower unscanned, the text tower scanned."""
    model, flat, *_ = case
    flat = dict(flat)
    restack(flat, "params/img/Transformer/encoderblock", False)
    restack(flat, "params/txt/Encoder_0/encoderblock", True)
    navit.save(model, tmp_path / "a.npz", "big_vision")
    with np.load(tmp_path / "a.npz") as found:
        back = dict(found)
    assert back.keys() == flat.keys()
    for name, value in flat.items():
        assert back[name].tobytes() == value.tobytes(), name
        assert back[name].shape == value.shape and back[name].dtype == value.dtype
