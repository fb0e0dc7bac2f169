"""Views of a resolution strategy: pixels, packing, vectors and features."""

import dataclasses
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_config, vision_config
from PIL import Image

import navit
from navit import strategies
from navit.embed_files import embed_files
from navit.input import pixels
from navit.input.image_list import images_of
from navit.model.two_tower import TwoTower

PATCH = 4
SMALL = [
    strategies.Square(16, PATCH, fit="squash"),
    strategies.Square(16, PATCH, fit="crop"),
    strategies.Square(16, PATCH, fit="pad"),
    strategies.AnyRes(16, PATCH, canvases=strategies.AnyRes.grid(16, 2, 3)),
    strategies.Template(16, PATCH),
    strategies.InternVL(16, max_tiles=6, patch=PATCH),
    strategies.DeepSeekVL2(16, patch=PATCH),
    strategies.DeepSeekOCR(base=32, tile=16, patch=PATCH),
    strategies.LLaVAUHD(16, patch=PATCH),
    strategies.MiniCPMV(16, patch=PATCH),
    strategies.UReader(16, 6, patch=PATCH),
    strategies.LLaVAMini(16, patch=PATCH),
    strategies.QwenVL(PATCH, min_pixels=64, max_pixels=1000),
    strategies.Kimi(PATCH, 50),
    strategies.NaFlex(PATCH, 40),
    strategies.Pixtral(PATCH, 64),
]
IDS = [type(s).__name__ for s in SMALL]
RNG = np.random.default_rng(0)
IMAGES = [
    RNG.integers(0, 256, (h, w, 3), np.uint8)
    for h, w in ((40, 90), (700, 30), (17, 16), (64, 64))
]


def by_pillow(image, view, strategy):
    """A view as its definition says: crop, resize, paste, cut."""
    top, left, bottom, right = view.box
    method = Image.Resampling[strategy.resample.upper()]
    part = Image.fromarray(image).crop((left, top, right, bottom))
    canvas = part.resize(view.size[::-1], method)
    top, left, bottom, right = view.window
    shown = Image.new("RGB", (right - left, bottom - top), view.fill or (0, 0, 0))
    shown.paste(canvas, (-left, -top))
    rows, columns = view.grid
    return np.asarray(shown)[: rows * strategy.patch, : columns * strategy.patch]


@pytest.mark.parametrize("strategy", SMALL, ids=IDS)
def test_packed_views_have_pillows_pixels(strategy):
    packed, index = navit.pack(
        IMAGES, patch_size=PATCH, row_tokens=4096, strategy=strategy, return_index=True
    )
    packed.check()
    views = navit.unpack(packed.patches, packed, index)
    expected = [
        by_pillow(image, view, strategy)
        for image in IMAGES
        for view in strategy.views(*image.shape[:2])
    ]
    assert len(views) == len(expected)
    for view, image in zip(views, expected, strict=True):
        rows, columns = view.shape[:2]
        seen = view.reshape(rows, columns, PATCH, PATCH, 3).swapaxes(1, 2)
        assert np.array_equal(seen.reshape(image.shape), image)


def test_a_jpeg_is_decoded_once_and_never_below_its_largest_canvas(monkeypatch):
    """A scaled decode is within the levels that `load` promises of the full one."""
    gradient = np.linspace(0, 255, 1600).astype(np.uint8)
    image = np.stack([np.broadcast_to(gradient, (1200, 1600))] * 3, -1)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    decoded = []
    decode = pixels.simplejpeg.decode_jpeg

    def spied(*args, **kwargs):
        decoded.append(decode(*args, **kwargs))
        return decoded[-1]

    monkeypatch.setattr(pixels.simplejpeg, "decode_jpeg", spied)
    strategy = strategies.InternVL(16, max_tiles=6, patch=PATCH)
    packed = navit.pack([file.getvalue()], patch_size=PATCH, strategy=strategy)
    (only,) = decoded
    size = strategy.views(1200, 1600)[0].size
    assert only.shape[0] < 1200  # it was scaled
    assert min(only.shape[0] / size[0], only.shape[1] / size[1]) >= 2
    whole = navit.pack([image], patch_size=PATCH, strategy=strategy)
    difference = np.abs(whole.patches.astype(int) - packed.patches)
    assert difference.max() <= 9


def test_naflex_as_a_strategy_packs_what_a_budget_packs():
    budget = navit.pack(IMAGES, patch_size=PATCH, max_tokens=40)
    strategy = strategies.NaFlex(PATCH, 40)
    views = navit.pack(IMAGES, patch_size=PATCH, strategy=strategy)
    for one, other in zip(budget, views, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    towers = dataclasses.replace(config.model, vision=vision_config())
    several = dataclasses.replace(config.eval, batch_tokens=64)  # batches
    config = dataclasses.replace(config, model=towers, eval=several)
    return navit.Embedder(TwoTower(towers, rngs=nnx.Rngs(0)), config, step=0)


@pytest.mark.parametrize(
    "strategy",
    [SMALL[5], SMALL[9], SMALL[13]],
    ids=["InternVL", "MiniCPMV", "Kimi"],  # equal views, unequal views, one view
)
def test_an_image_is_the_mean_of_its_views_as_if_each_were_alone(model, strategy):
    vectors = model.embed_images(IMAGES, strategy=strategy)
    assert vectors.dtype == np.float32
    features = list(model.features(IMAGES, strategy=strategy))
    for image, vector, seen in zip(IMAGES, vectors, features, strict=True):
        views = strategy.views(*image.shape[:2])
        assert [view for view, _ in seen] == list(views)
        total = 0
        for view, tokens in seen:
            pixels_ = by_pillow(image, view, strategy)
            alone = navit.pack(
                [pixels_],
                patch_size=PATCH,
                row_tokens=128,
                strategy=strategies.Kimi(PATCH, 4096, merge=1),
            )
            out = jax.jit(lambda tower, packed: tower(packed))(model.vision, alone)
            (expected,) = navit.unpack(out.packed)
            np.testing.assert_allclose(tokens, expected, atol=1e-5)
            total = total + np.prod(view.grid) * np.asarray(out.pooled)[0, 0]
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-5)


def test_photographs_through_every_strategy(model):
    sample = Path(__file__).parents[2] / "data/sample"
    photographs = sorted(sample.glob("*.jpg"))
    assert len(photographs) > 10
    for strategy in SMALL:
        vectors = model.embed_images(photographs, strategy=strategy)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)


def test_what_cannot_be_packed_is_named(model, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    long = np.zeros((1, 60_000, 3), np.uint8)
    qwen = strategies.QwenVL(PATCH)
    with pytest.raises(ValueError, match=r"image 1 .*1x60000 pixels has an aspect"):
        navit.pack([IMAGES[0], long], patch_size=PATCH, strategy=qwen)
    with pytest.raises(ValueError, match=r"image 1 .*bad\.jpg"):
        model.embed_images([IMAGES[0], tmp_path / "bad.jpg"], strategy=SMALL[0])
    with pytest.raises(ValueError, match=r"a view of image 1 has .* more than a row"):
        navit.pack(
            IMAGES[:2], patch_size=PATCH, row_tokens=64, strategy=strategies.Kimi(PATCH)
        )
    with pytest.raises(ValueError, match="max_tokens=9 has no effect"):
        model.embed_images(IMAGES, 9, strategy=qwen)
    with pytest.raises(ValueError, match="cuts patches of 14 pixels"):
        model.embed_images(IMAGES, strategy=strategies.QwenVL())
    assert model.embed_images([], strategy=qwen).shape == (0, model.embed_dim)


def test_a_model_embeds_by_its_own_strategy_unless_told_otherwise(model):
    own, other = SMALL[5], SMALL[12]
    data = dataclasses.replace(
        tiny_config().data, strategy=own, budgets=(256,), row_tokens=64
    )
    config = dataclasses.replace(model.config, data=data)
    trained = navit.Embedder(model.model, config, step=0)
    np.testing.assert_array_equal(
        trained.embed_images(IMAGES), model.embed_images(IMAGES, strategy=own)
    )
    np.testing.assert_array_equal(
        trained.embed_images(IMAGES, strategy=other),
        model.embed_images(IMAGES, strategy=other),
    )
    np.testing.assert_array_equal(
        trained.embed_images(IMAGES, 40), model.embed_images(IMAGES, 40)
    )
    views = [len(seen) for seen in trained.features(IMAGES)]
    assert views == [len(own.views(*image.shape[:2])) for image in IMAGES]


def test_files_that_are_refused_or_unreadable_are_left_out_and_named(
    model, tmp_path, caplog
):
    names = []
    for i, image in enumerate([*IMAGES, np.zeros((2, 500, 3), np.uint8)]):
        names.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(names[-1])
    names[1].write_bytes(names[1].read_bytes()[:900])  # the header is whole
    images = images_of([f"{name}" for name in names], io.StringIO())
    qwen, out = SMALL[12], tmp_path / "z.npz"
    with pytest.raises(ValueError, match=r"1\.png.*--skip-unreadable"):
        embed_files(model, images[:2], out, strategy=qwen)
    count = embed_files(model, images, out, strategy=qwen, skip_unreadable=True)
    assert count == 3
    assert "1.png" in caplog.text
    assert re.search(r"4\.png .*2x500 pixels has an aspect of 250:1", caplog.text)
    expected = model.embed_images([IMAGES[0], *IMAGES[2:]], strategy=qwen)
    with np.load(out) as found:
        names = [Path(name).name for name in found["names"]]
        np.testing.assert_allclose(found["embeddings"], expected, atol=1e-6)
    assert names == ["0.png", "2.png", "3.png"]


def test_one_tile_of_a_jpeg_has_the_same_pixels_as_beside_the_others():
    """Rows of a batch may hold only the first tile of an image."""
    buffer = io.BytesIO()
    Image.effect_noise((800, 800), 60).convert("RGB").save(buffer, "JPEG")
    views = strategies.LLaVAMini(16, splits=4, patch=PATCH).views(800, 800)
    parts = [(view.box, view.size) for view in views]
    together = pixels.load_parts(buffer.getvalue(), parts)
    for part, array in zip(parts[:-1], together[:-1], strict=True):
        np.testing.assert_array_equal(
            pixels.load_parts(buffer.getvalue(), [part])[0], array
        )
