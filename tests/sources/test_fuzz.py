"""Damaged and odd files through a whole epoch: none crashes it, all are counted."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from navit.config import Config, DataConfig, Folder, ModelConfig, TextConfig
from navit.input.pipeline import open_source, train_batches
from navit.plan.batches import BatchPlans

# Pillow warns about damaged EXIF data and odd TIFFs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

COLOURS = {"top": (220, 30, 30), "bottom": (30, 30, 220)}


def halves(width=48, height=72) -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), COLOURS["top"])
    image.paste(COLOURS["bottom"], (0, height // 2, width, height))
    return image


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG that EXIF turns upright: red above, blue below."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's numbers of the inverses
    image = halves()
    if orientation in undo:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header claims `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def odd_tags() -> bytes:
    """A TIFF whose tags have a type that Pillow trips over."""
    data = bytearray(encoded(Image.new("RGB", (70, 50)), "TIFF"))
    data[72] = 2
    return bytes(data)


def odd() -> dict[str, bytes]:
    """Files that are fine, each in its own way."""
    image = halves()
    grey16 = np.linspace(0, 65535, 48 * 72).reshape(72, 48).astype(np.uint16)
    palette = image.quantize(8)
    palette.info["transparency"] = 0
    files = {f"exif{i}.jpg": turned(i) for i in range(1, 9)}
    files |= {
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "one_bit.png": encoded(image.convert("1"), "PNG"),
        "sixteen_bit.png": encoded(Image.fromarray(grey16), "PNG"),
        "palette_alpha.png": encoded(palette, "PNG", transparency=0),
        "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "grey_alpha.png": encoded(image.convert("LA"), "PNG"),
        "still.webp": encoded(image, "WEBP"),
        "moving.gif": encoded(image, "GIF", save_all=True, append_images=[image] * 3),
        "moving.webp": encoded(image, "WEBP", save_all=True, append_images=[image] * 2),
        "bitmap.bmp": encoded(image, "BMP"),
        "tiff.tif": encoded(image, "TIFF"),
        "wide.jpg": encoded(halves(900, 6), "JPEG"),
        "pixel.png": encoded(halves(1, 2), "PNG"),
        "png_called.jpg": encoded(image, "PNG"),
        "jpeg_called.png": encoded(image, "JPEG"),
    }
    return files


def damaged(rng, files: dict[str, bytes], count: int) -> dict[str, bytes]:
    """Truncated, flipped, overwritten and emptied copies, and files of no image."""
    out = {
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "bomb.png": bomb(50_000),
        "html.webp": b"<html><body>404</body></html>",
        "magic.jpg": b"\xff\xd8\xff",
        "tags.tif": odd_tags(),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
    }
    names = sorted(files)
    while len(out) < count:
        i = len(out)
        name = names[i % len(names)]
        data = bytearray(files[name])
        kind = i // len(names) % 4
        if kind == 0:
            data = data[: rng.integers(0, len(data))]
        elif kind == 1:
            for place in rng.integers(0, len(data), rng.integers(1, 20)):
                data[place] ^= 1 << rng.integers(0, 8)
        elif kind == 2:
            start = rng.integers(0, len(data))
            end = min(len(data), start + rng.integers(1, 200))
            data[start:end] = rng.bytes(end - start)
        else:
            data[int(rng.integers(0, min(60, len(data))))] = int(rng.integers(0, 256))
        out[f"{i:03}_{name}"] = bytes(data)
    return out


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    """One epoch of 520 damaged files and 25 odd ones: the result by name."""
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    good = odd()
    bad = damaged(rng, good, 520)
    files = good | bad
    for name, data in files.items():
        (folder / name).write_bytes(data)
    table = "".join(f"{name},a caption\n" for name in files)
    (folder / "table.csv").write_text("file,caption\n" + table)
    data = DataConfig(
        train=Folder(path=str(folder)), budgets=(16,), row_tokens=64, rows=2, slots=4
    )
    logged = logging.getLogger("navit")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logged.addHandler(handler)
    try:
        source = open_source(data.train)
        plans = BatchPlans(source.sizes, data, patch_size=4, steps=10**6)
        cfg = Config(model=ModelConfig(text=TextConfig(length=8)), data=data)
        cfg = with_patch(cfg, 4, plans.steps_per_epoch)
        batches = list(train_batches(cfg, source))
    finally:
        logged.removeHandler(handler)
    found = {}
    for batch in batches:
        for row, slot in np.argwhere(batch.id >= 0):
            mine = batch.images.segment_ids[row] == slot + 1
            name = source.name(int(batch.id[row, slot])).rsplit("/", 1)[-1]
            grid = batch.images.grids[row, slot]
            found[name] = (grid, batch.images.patches[row, mine])
    return good, bad, source, found, records


def with_patch(config: Config, patch_size: int, steps: int) -> Config:
    from navit.config import override

    return override(
        config, [f"model.vision.patch_size={patch_size}", f"train.steps={steps}"]
    )


def test_every_file_is_used_left_out_or_left_empty_and_named(epoch):
    good, bad, source, found, records = epoch
    assert len(bad) >= 500
    used = {source.name(i).rsplit("/", 1)[-1] for i in range(len(source))}
    names = (good | bad).keys() - used
    assert source.left_out == len(names)
    assert any(f"{len(names)} " in r for r in records if "left out" in r), records[:9]
    empty = {r.split(": ")[1].split(" (")[0] for r in records if "left empty" in r}
    # An epoch plans every readable header, except those that do not fill a last batch.
    assert len(source) - 8 < len(found) <= len(source)
    hollow = {name for name, (grid, _) in found.items() if not grid.any()}
    assert hollow == {name.rsplit("/", 1)[-1] for name in empty}
    assert {"empty.jpg", "text.jpg", "bomb.png", "html.webp", "magic.jpg"} <= names
    assert "postscript.jpg" in names
    # Both kinds occur, and most damage is in the pixels, where it is not fatal.
    assert len(names) > 50 and len(hollow) > 10


def test_odd_files_come_out_upright(epoch):
    good, _, _, found, _ = epoch
    checked = 0
    for name in good:
        if name not in found:
            continue  # left out of the epoch with an incomplete batch
        grid, patches = found[name]
        assert grid.any(), name
        if name.startswith("exif"):
            rows, columns = grid
            assert rows > columns, name
            image = patches.reshape(rows, columns, 4, 4, 3).astype(int)
            for part, wanted in (
                (image[: rows // 2 - 1], COLOURS["top"]),
                (image[(rows + 1) // 2 + 1 :], COLOURS["bottom"]),
            ):
                assert np.abs(part - wanted).mean() < 12, name
            checked += 1
    assert checked >= 6
