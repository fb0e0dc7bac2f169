"""navit.input.pixels: any image file -> upright RGB of a given size -> patches."""

import io
import struct
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, features

import navit
from navit.input import pixels as pixels_lib
from navit.input.pixels import load, to_patches
from navit.plan import geometry
from navit.plan.geometry import grid_for
from navit.sources.images import UPRIGHT, size_of

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
BILINEAR = Image.Resampling.BILINEAR
ORIENTATION = 0x0112
DAMAGED = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("GIF", "P")]
DAMAGED += [("WEBP", "RGB"), ("BMP", "RGB")]
# Only newer Pillows write it, and its reader raises its own errors.
DAMAGED += [("AVIF", "RGB")] if features.check("avif") else []


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def quarters() -> np.ndarray:
    """32x48 pixels, red, green / blue, yellow: every turn and flip looks different."""
    colours = np.array(
        [[(220, 30, 30), (30, 160, 60)], [(40, 60, 200), (230, 210, 40)]], np.uint8
    )
    return colours.repeat(16, 0).repeat(24, 1)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand, for what Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("patch", [1, 4, 16])
def test_patches_are_in_row_column_channel_order(rng, patch):
    rows, columns = 3, 5
    image = rng.integers(0, 256, (rows * patch, columns * patch, 3), np.uint8)
    row = np.full((20, patch * patch * 3), 7, np.uint8)
    to_patches(image, patch, row[2:17])
    for r in range(rows):
        for c in range(columns):
            for y in range(patch):
                for x in range(patch):
                    got = row[2 + r * columns + c].reshape(patch, patch, 3)[y, x]
                    np.testing.assert_array_equal(
                        got, image[r * patch + y, c * patch + x]
                    )
    # The rest of the row is another image's.
    assert (row[:2] == 7).all() and (row[17:] == 7).all()


def test_patches_of_an_image_that_is_not_contiguous(rng):
    image = rng.integers(0, 256, (8, 24, 3), np.uint8)
    one, other = np.zeros((2, 3, 192), np.uint8)
    to_patches(image[:, ::-1], 8, one)
    to_patches(image[:, ::-1].copy(), 8, other)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [(32, 48), (16, 16), (64, 144)])
def test_a_file_an_array_and_a_pil_image_give_the_same_pixels(rng, size):
    image = rng.integers(0, 256, (32, 48, 3), np.uint8)
    kinds = encode(image, "PNG"), image, Image.fromarray(image)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], BILINEAR))
    for kind in kinds:
        assert size_of(kind) == (32, 48)
        np.testing.assert_array_equal(load(kind, *size), expected)


def test_every_kind_of_image_gives_the_same_pixels(rng, tmp_path):
    image = rng.integers(0, 256, (32, 48, 3), np.uint8)
    data = encode(image, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(7)  # it is read from its start, wherever it stands
        kinds = [image, Image.fromarray(image), jnp.asarray(image)]
        kinds += [data, bytearray(data), memoryview(data), io.BytesIO(data)]
        kinds += [file, path, str(path)]
        packed = [navit.pack([kind], max_tokens=6, row_tokens=6) for kind in kinds]
        together = navit.pack(np.stack([image] * 2), max_tokens=6, row_tokens=6)
    for one in packed[1:]:
        np.testing.assert_array_equal(one.patches, packed[0].patches)
    for row in together.patches:
        np.testing.assert_array_equal(row, packed[0].patches[0])


class OnDevice:
    """As a tensor of torch on a GPU."""

    shape = (8, 8, 3)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise NotImplementedError

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0: use Tensor.cpu() first")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"\(3, 8, 9\): .*permute"),
        (jnp.zeros((3, 8, 9)), r"float32 \(3, 8, 9\).*permute.*\* 255"),
        (np.zeros((8, 9, 3)), r"float64 \(8, 9, 3\).*\* 255"),
        (np.zeros((8, 9, 3), np.uint16), r"uint16 \(8, 9, 3\)$"),
        (OnDevice(), r"a OnDevice did not.*cuda:0: use Tensor.cpu\(\) first"),
        ("no/such.jpg", "no/such.jpg"),
    ],
)
def test_an_image_that_cannot_be_taken_is_refused_with_the_remedy(image, words):
    with pytest.raises(ValueError, match=r"image 1 .*cannot be read: .*" + words):
        navit.pack([np.zeros((8, 8, 3), np.uint8), image])


@pytest.mark.parametrize(
    "image", ["cat.jpg", np.zeros((8, 8, 3), np.uint8), jnp.zeros((8, 8), jnp.uint8)]
)
def test_one_image_is_not_a_list_of_images(image):
    with pytest.raises(ValueError, match=r"one image.*\[image\]"):
        navit.pack(image)


# How a picture is stored, by the EXIF standard's "row 0 is .., column 0 is ..".
STORED = {
    1: lambda x: x,  # top, left
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.swapaxes(0, 1),  # left, top
    6: lambda x: x[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda x: x[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("times", [1, 16])  # 16: large enough for the scaled decode
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_comes_out_upright(orientation, format, times):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = quarters().repeat(times, 0).repeat(times, 1)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, format, exif=exif, quality=95)
    for image in (data, Image.open(io.BytesIO(data))):
        assert size_of(image) == upright.shape[:2]
        pixels = load(image, 32, 48).astype(int)
        # Away from the borders of the quarters, where the resize mixes.
        inner = (np.abs(np.arange(32) - 15.5) > 3)[:, None] & (
            np.abs(np.arange(48) - 23.5) > 3
        )
        assert np.abs(pixels - quarters())[inner].max() <= 8


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_outside_the_standard_is_ignored(orientation, format):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(quarters(), format, exif=exif, quality=95)
    assert size_of(data) == (32, 48)
    pixels = load(data, 32, 48)
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels.astype(int) - quarters()).mean() < 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_size_of_reads_the_header_and_decodes_nothing(monkeypatch, format):
    data = encode(quarters(), format)

    def decode(self):
        raise MemoryError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert size_of(data) == (32, 48)


@pytest.mark.parametrize("colour", [(220, 30, 30), (30, 160, 60), (250, 250, 250)])
def test_a_cmyk_jpeg_keeps_its_colour(colour):
    image = Image.new("RGB", (40, 24), colour).convert("CMYK")
    pixels = load(encode(image, "JPEG", quality=95), 24, 40)
    assert np.abs(pixels.astype(int) - colour).max() <= 6


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_grey_image_has_three_equal_channels(rng, format):
    grey = rng.integers(0, 256, (6, 10), np.uint8).repeat(8, 0).repeat(8, 1)
    pixels = load(encode(grey, format, quality=95), 48, 80).astype(int)
    assert (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0] - grey).mean() < 2


def test_one_bit_a_pixel_is_black_and_white(rng):
    bits = rng.integers(0, 2, (20, 30)).astype(bool)
    pixels = load(encode(bits, "PNG"), 20, 30)
    np.testing.assert_array_equal(pixels, (bits[..., None] * 255).repeat(3, -1))


def test_sixteen_bits_a_channel_keep_their_brightness(rng):
    wide = rng.integers(0, 2**16, (4, 5, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    colour = load(png(5, 4, 16, 2, rows), 4, 5)
    assert np.abs(colour - wide / 257).max() <= 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide[..., 0])
    grey = load(png(5, 4, 16, 0, rows), 4, 5)
    assert np.abs(grey - wide[..., :1] / 257).max() <= 1


def test_sixteen_bits_a_channel_take_no_more_memory_than_they_need(rng):
    wide = Image.fromarray(rng.integers(0, 2**16, (500, 600), np.uint16))
    tracemalloc.start()
    pixels_lib._to_rgb(wide)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 * 500 * 600


@pytest.mark.parametrize("source", ["file", "array", "pil"])
def test_transparency_lies_over_white(source):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4] = 200, 100, 0, 255
    image[4:] = 200, 100, 0, 51  # a fifth
    kinds = {"file": encode(image, "PNG"), "array": image}
    pixels = load(kinds.get(source, Image.fromarray(image)), 8, 8).astype(int)
    assert (pixels[:4] == (200, 100, 0)).all()
    expected = 0.2 * np.array([200, 100, 0]) + 0.8 * 255
    assert np.abs(pixels[4:] - expected).max() <= 1


def test_a_palette_with_a_transparent_colour_lies_over_white():
    image = Image.new("P", (8, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 4))
    pixels = load(encode(image, "PNG", transparency=0), 4, 8)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (0, 0, 255)).all()


def test_an_animation_is_its_first_frame():
    red, blue = (Image.new("RGB", (12, 8), c) for c in ("#ff0000", "#0000ff"))
    data = encode(red, "GIF", save_all=True, append_images=[blue], duration=100)
    assert size_of(data) == (8, 12)
    assert (load(data, 8, 12) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["galaxies.jpg", "rocket.jpg", "cat.jpg"])
def test_the_accurate_transform_is_pillows(name):
    data = (SAMPLE / name).read_bytes()
    pillow = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = size_of(data)
    np.testing.assert_array_equal(
        load(data, height, width, dct="accurate"), np.asarray(pillow)
    )
    # At 256 tokens these three shrink too little for the decoder to scale.
    rows, columns = grid_for(height, width, max_tokens=256)
    np.testing.assert_array_equal(
        load(data, rows * 16, columns * 16, dct="accurate"),
        np.asarray(pillow.resize((columns * 16, rows * 16), BILINEAR)),
    )


@pytest.mark.parametrize(
    # 1411 pixels per side is not a multiple of 2; 872 and 1000 are.
    ("name", "tokens"),
    [("retina.jpg", 256), ("galaxies.jpg", 128), ("galaxies.jpg", 64)],
)
def test_the_scaled_decode_stays_near_the_full_one(monkeypatch, name, tokens):
    data = (SAMPLE / name).read_bytes()
    decode = simplejpeg.decode_jpeg
    full = Image.fromarray(decode(data, fastdct=True))
    rows, columns = grid_for(full.height, full.width, max_tokens=tokens)
    sides = []

    def decode_and_note(*args, **kwargs):
        pixels = decode(*args, **kwargs)
        sides.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_and_note)
    pixels = load(data, rows * 16, columns * 16).astype(int)
    assert sides[0] < full.height  # the decoder did scale
    expected = full.resize((columns * 16, rows * 16), BILINEAR)
    difference = np.abs(pixels - np.asarray(expected))
    assert difference.max() <= 9
    assert difference.mean() <= 0.7


def test_an_unknown_transform_is_refused():
    data = (SAMPLE / "cat.jpg").read_bytes()
    with pytest.raises(ValueError, match="acurate"):
        load(data, 32, 32, dct="acurate")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(rng, format, mode, share):
    if format == "PNG":
        mode = mode.replace("CMYK", "RGBA")
    image = Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).convert(mode)
    data = encode(image, format)
    with pytest.raises(ValueError):
        load(data[: int(len(data) * share)], 32, 48)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 500,
        b"a cat\n" * 50,
        b"<html><body>404",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
    ],
    ids=["empty", "zeros", "text", "html", "jpeg start", "gif start"],
)
@pytest.mark.parametrize("read", [size_of, lambda data: load(data, 16, 16)])
def test_data_that_is_not_an_image_is_refused_in_one_line(read, data):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on damaged metadata
@pytest.mark.parametrize(("format", "mode"), DAMAGED)
def test_a_damaged_file_is_pixels_or_a_value_error(rng, format, mode):
    with Image.open(SAMPLE / "cat.jpg") as image:
        data = encode(image.resize((90, 60)).convert(mode), format)
    for trial in range(120):
        damaged = bytearray(data)
        reach = 300 if trial % 2 else len(data)  # headers break in more ways
        at = int(rng.integers(0, reach))
        damaged[at : at + 4] = rng.bytes(4)
        for read in (size_of, lambda data: load(data, 32, 48).shape):
            try:
                assert len(read(bytes(damaged))) in (2, 3)
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize("read", [size_of, lambda data: load(data, 16, 16)])
@pytest.mark.parametrize("side", [12_000, 50_000])  # Pillow refuses only the second
def test_a_header_of_too_many_pixels_is_refused_before_its_pixels(
    monkeypatch, read, side
):
    def decode(self):
        raise MemoryError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(ValueError, match=r"pixels.*limit"):
        read(png(side, side, 8, 2, b"\0" * 1000))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), "4, 4, 2"),
        (np.zeros((3, 4, 4, 3), np.uint8), "3, 4, 4, 3"),
        (np.zeros((0, 4, 3), np.uint8), "0, 4, 3"),
        (np.zeros(4, np.uint8), "4"),
    ],
)
@pytest.mark.parametrize("read", [size_of, lambda array: load(array, 16, 16)])
def test_an_array_that_is_not_an_image_is_refused_by_shape_or_type(read, array, words):
    with pytest.raises(ValueError, match=words):
        read(array)


def test_threads_that_read_sizes_leave_the_warning_filters_alone():
    # FolderSource reads headers in threads; the filters belong to the whole process.
    data = encode(quarters(), "JPEG")
    interval = sys.getswitchinterval()
    before = list(warnings.filters)
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(size_of, [data] * 2000)) == {(32, 48)}
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


@pytest.fixture(scope="module")
def big_vision():
    """TensorFlow's own decode and resize; see tests/golden/make_pixels.py."""
    with np.load(Path(__file__).parents[1] / "golden/pixels.npz") as found:
        return dict(found)


def test_pixels_are_those_of_big_vision_within_a_grey_level(big_vision):
    """200 JPEGs at budgets 64 to 1024; ours are rounded, so half a level is due."""
    worst, scaled = 0.0, 0
    for i in range(200):
        data, want = big_vision[f"jpeg_{i}"].tobytes(), big_vision[f"pixels_{i}"] / 16
        height, width = want.shape[:2]
        h, w = size_of(data)
        if min(h / height, w / width) >= 4:  # the scaled decode; tested above
            scaled += 1
            continue
        worst = max(worst, np.abs(load(data, height, width) - want).max())
    assert worst <= 1.0
    assert scaled < 20


@pytest.mark.parametrize("column, budget", [(0, 64), (1, 256), (2, 729), (3, 1024)])
def test_grids_are_those_of_transformers(big_vision, column, budget):
    grids = geometry.grids_for(big_vision["grid_sizes"], budget, patch_size=16)
    np.testing.assert_array_equal(grids, big_vision["grids"][:, column])


def test_a_box_is_that_part_of_the_image(rng):
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    found = load(image, 20, 30, box=(10, 15, 20, 30))
    np.testing.assert_array_equal(found, image[10:30, 15:45])
    half = load(image, 16, 16, box=(5, 40, 40, 48))
    # At its edges the resize sees the pixels beyond.
    alone = load(image[5:45, 40:88], 16, 16)
    np.testing.assert_array_equal(half[2:-2, 2:-2], alone[2:-2, 2:-2])
    assert (half != alone).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_in_upright_pixels(orientation):
    """A smooth ramp, stored in each orientation; its box is the same part always."""
    y, x = np.mgrid[:96, :64]
    ramp = np.stack([2 * y, 3 * x, x + y], -1).astype(np.uint8)
    undo = {1: None, 5: 5, 6: 8, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(ramp)
    if undo is not None:
        stored = stored.transpose(UPRIGHT[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=98, subsampling=0, exif=exif)
    found = load(file.getvalue(), 24, 16, box=(30, 20, 48, 32)).astype(int)
    wanted = load(ramp, 24, 16, box=(30, 20, 48, 32))
    assert np.abs(found - wanted).max() <= 4


def test_a_box_of_a_large_jpeg_is_decoded_at_a_smaller_scale():
    y, x = np.mgrid[:1024, :1024] / 8
    image = np.stack([y, x, (x + y) / 2], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=98, subsampling=0)
    found = load(file.getvalue(), 32, 32, box=(101, 203, 512, 640)).astype(int)
    wanted = load(image, 32, 32, box=(101, 203, 512, 640))
    assert np.abs(found - wanted).max() <= 2


def test_a_box_beyond_the_image_is_refused(rng):
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    with pytest.raises(ValueError, match="ends at row 61, column 40: its size has"):
        load(image, 16, 16, box=(1, 10, 60, 30))
