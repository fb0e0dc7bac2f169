"""big_vision's layout, run by flax.linen: its names, its shapes, its numbers.

The two towers are stated here as big_vision's models/vit.py, naflex_vit.py and
text_transformer.py are made of linen's layers, so the parameters come out under the
names that its checkpoints have. Like naflex_vit.py, the image tower masks padding.
"""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import LAYOUTS, each_image, pack, restack

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
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y, mask=mask)
        return x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
    depth: int
    mlp_dim: int
    heads: int
    scan: bool

    @nn.compact
    def __call__(self, x, mask=None):
        if self.scan:
            stack = nn.scan(
                EncoderBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = stack(self.mlp_dim, self.heads, name="encoderblock")(x, mask)
        else:
            for i in range(self.depth):
                block = EncoderBlock(self.mlp_dim, self.heads, name=f"encoderblock_{i}")
                x, _ = block(x, mask)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    mlp_dim: int
    heads: int

    @nn.compact
    def __call__(self, x, mask):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, WIDTH))
        attend = nn.MultiHeadDotProductAttention(num_heads=self.heads)
        x = attend(probe, x, mask=mask)
        return (x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)))[:, 0]


class Image(nn.Module):
    scan: bool
    embed_dim: int | None = None

    @nn.compact
    def __call__(self, patches, grid):
        x = nn.Dense(WIDTH, name="embedding")(patches)
        init = nn.initializers.normal(0.2)
        table = self.param("pos_embedding", init, (SIDE, SIDE, WIDTH))
        # The first cells of an array that any of GRIDS fits into.
        resized = jax.image.scale_and_translate(
            table,
            (*np.max(GRIDS, axis=0).tolist(), WIDTH),
            (0, 1),
            grid / SIDE,
            jnp.zeros(2),
            "bilinear",
            antialias=True,
        )
        place = jnp.arange(patches.shape[1])
        x = x + resized[place // grid[1], place % grid[1]][None]
        mask = (place < grid[0] * grid[1])[None, None, None]
        x = Encoder(3, MLP, HEADS, self.scan, name="Transformer")(x, mask)
        pooled = MAPHead(MLP, HEADS)(x, mask)
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
        rng.uniform(-1, 1, (h * w, PATCH**2 * 3)).astype(np.float32) for h, w in GRIDS
    ]
    ids = rng.integers(0, 61, (4, LENGTH))
    longest = max(len(p) for p in patches)
    padded = [np.pad(p, ((0, longest - len(p)), (0, 0)))[None] for p in patches]
    grids = np.array(GRIDS)

    def draw(path, leaf):
        scale = jax.tree_util.keystr(path).endswith("['scale']")
        return np.float32(scale + 0.2 * rng.standard_normal(leaf.shape))

    shapes = {
        "img": jax.eval_shape(image.init, jax.random.key(0), padded[0], grids[0]),
        "txt": jax.eval_shape(text.init, jax.random.key(0), ids),
    }
    params = {
        tower: jax.tree_util.tree_map_with_path(draw, shape["params"])
        for tower, shape in shapes.items()
    }
    params |= {"t": np.array([1.3], np.float32), "b": np.array([-4.2], np.float32)}
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(image.apply)
        out = [
            apply({"params": params["img"]}, p, g)
            for p, g in zip(padded, grids, strict=True)
        ]
        texts = jax.jit(text.apply)({"params": params["txt"]}, ids)
    flat = flax.traverse_util.flatten_dict({"params": params}, sep="/")
    file = tmp_path_factory.mktemp("big_vision") / "model.npz"
    np.savez(file, **flat)
    model = navit.load(file)
    encode = jax.jit(lambda packed: model.vision(packed))
    return model, encode, flat, patches, ids, out, np.asarray(texts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_equal_big_vision(case, layout):
    """Beyond 64 patches a side too, where its own model gives NaN."""
    _, encode, _, patches, _, out, _ = case
    packed = pack(list(zip(patches, GRIDS, strict=True)), layout)
    for i, tokens, pooled in each_image(encode(packed), packed, layout):
        np.testing.assert_allclose(tokens, out[i][1][0, : len(tokens)], atol=5e-5)
        np.testing.assert_allclose(pooled, out[i][0][0], atol=5e-5)


def test_texts_scale_and_bias_equal_big_vision(case):
    model, _, flat, _, ids, _, texts = case
    np.testing.assert_allclose(jax.jit(lambda x: model.text(x))(ids), texts, atol=5e-5)
    t, b = flat["params/t"][0], flat["params/b"][0]
    one = np.ones((1, 1), np.float32)
    np.testing.assert_allclose(model.logits(one, one), [[np.exp(t) + b]], rtol=1e-6)


def test_the_file_is_reproduced_tensor_for_tensor(case, tmp_path):
    """In the public layout: the image tower unscanned, the text tower scanned."""
    model, _, flat, *_ = case
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
