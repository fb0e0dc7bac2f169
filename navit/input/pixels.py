"""Encoded image -> upright RGB -> resized to its grid -> patches in a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from navit.sources.images import (
    DAMAGED,
    UPRIGHT,
    ImageLike,
    open_image,
    orientation,
    standard,
)

# JPEG decoding can halve the image up to three times for free. Each halving must leave
# this many source pixels per target pixel, so that the antialiased resize still does
# the filtering: at 256 tokens, within about 9 grey levels of the full decode.
_DCT_MARGIN = 2.0


def load(
    image: ImageLike,
    height: int,
    width: int,
    *,
    dct: str = "fast",
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Decodes and resizes to `[height, width, 3]` uint8 RGB, upright.

    The resize is bilinear with antialiasing, as in big_vision, transformers and Pillow.
    Transparent images are blended over white.

    Args:
      dct: the JPEG inverse transform: "fast" is bit-exact with TensorFlow's default,
        hence big_vision's; "accurate" with Pillow's, hence transformers'.
      box: (top, left, height, width) of the part to take, in upright pixels; None takes
        all. At its edges, the resize also uses the image's pixels beyond the box.

    Raises:
      ValueError: if the image cannot be decoded.
    """
    if dct not in ("fast", "accurate"):
        raise ValueError(f'dct must be "fast" or "accurate", not {dct!r}')
    try:
        image = standard(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, bytes):
            if simplejpeg.is_jpeg(image):
                return _load_jpeg(image, height, width, dct, box)
            image = open_image(image)
        return np.asarray(_resize(_to_rgb(_upright(image)), height, width, box))
    except DAMAGED as error:
        raise ValueError(str(error)) from error


def load_parts(
    image: ImageLike,
    parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    dct: str = "fast",
    resample: Literal["bilinear", "bicubic"] = "bilinear",
) -> list[np.ndarray]:
    """Decodes an image once, and resizes parts of it to `[h, w, 3]` uint8, upright.

    An upright JPEG file is decoded at a smaller scale if all parts are the whole image,
    and if that leaves enough pixels for the largest result, as in `load`.

    Args:
      parts: (top, left, bottom, right) in upright pixels, and the (height, width) to
        resize it to. No pixel beyond the box is used.
      dct: as in `load`.
      resample: Pillow's filter, with antialiasing.

    Raises:
      ValueError: if the image cannot be decoded, or its size has changed.
    """
    whole = (0, 0, max(box[2] for box, _ in parts), max(box[3] for box, _ in parts))
    largest = (max(size[0] for _, size in parts), max(size[1] for _, size in parts))
    scaled = largest if all(box == whole for box, _ in parts) else None
    try:
        image = standard(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, bytes):
            decoded, scale = _decoded(image, (whole[2], whole[3]), scaled, dct)
        else:
            decoded, scale = _to_rgb(_upright(image)), 1
    except DAMAGED as error:
        raise ValueError(str(error)) from error
    if -(-whole[2] // scale) > decoded.height or -(-whole[3] // scale) > decoded.width:
        raise ValueError(
            f"an image of about {decoded.height * scale}x{decoded.width * scale} "
            f"pixels has no part that ends at row {whole[2]}, column {whole[3]}: its "
            "size has changed"
        )
    method = Image.Resampling[resample.upper()]
    resized = []
    for (top, left, bottom, right), (height, width) in parts:
        if scale == 1:
            part = decoded.crop((left, top, right, bottom))
            resized.append(np.asarray(part.resize((width, height), method)))
        else:
            box = (0, 0, right / scale, bottom / scale)
            resized.append(np.asarray(decoded.resize((width, height), method, box=box)))
    return resized


def to_patches(pixels: np.ndarray, patch_size: int, out: np.ndarray) -> None:
    """Cuts `[rows*p, columns*p, 3]` uint8 pixels into `out` `[rows*columns, p*p*3]`.

    `out` must be contiguous. As it is part of a packed row, this is the only copy.
    """
    p = patch_size
    rows, columns = pixels.shape[0] // p, pixels.shape[1] // p
    # One item is a line of a patch, p*3 bytes: moving whole lines is 3 times as fast as
    # moving bytes.
    line = np.dtype(f"V{p * 3}")
    lines = np.ascontiguousarray(pixels).reshape(rows, p, columns * p * 3).view(line)
    out.view(line).reshape(rows, columns, p)[...] = lines.transpose(0, 2, 1)


def _decoded(
    data: bytes, size: tuple[int, int], largest: tuple[int, int] | None, dct: str
) -> tuple[Image.Image, int]:
    """An upright RGB image, and by how much it was scaled down while it was decoded.

    Args:
      size: (height, width) of the part that is used; only a whole image is scaled.
      largest: the largest (height, width) that it is resized to; None: no scaling.
    """
    opened = open_image(data)
    if not simplejpeg.is_jpeg(data) or opened.mode not in ("RGB", "L"):
        return _to_rgb(_upright(opened)), 1
    turned = orientation(opened)
    if turned in UPRIGHT:  # a scaled image would end elsewhere when it is turned
        pixels = simplejpeg.decode_jpeg(data, fastdct=dct == "fast")
        return Image.fromarray(pixels).transpose(UPRIGHT[turned]), 1
    scale = 1
    if largest is not None and size == (opened.height, opened.width):
        scale = _scale(*size, *largest)
    pixels = _decode_jpeg(data, opened.height, opened.width, scale, dct)
    return Image.fromarray(pixels), scale


def _scale(full_height: int, full_width: int, height: int, width: int) -> int:
    """By how much to scale an image down while it is decoded: 1, 2, 4 or 8."""
    scale = 1
    while (
        scale < 8
        and full_height >= _DCT_MARGIN * 2 * scale * height
        and full_width >= _DCT_MARGIN * 2 * scale * width
    ):
        scale *= 2
    return scale


def _decode_jpeg(
    data: bytes, full_height: int, full_width: int, scale: int, dct: str
) -> np.ndarray:
    scaled: dict[str, Any] = {}
    if scale > 1:
        scaled = dict(
            min_height=-(-full_height // scale),
            min_width=-(-full_width // scale),
            min_factor=scale,
        )
    return simplejpeg.decode_jpeg(data, fastdct=dct == "fast", **scaled)


def _load_jpeg(
    data: bytes,
    height: int,
    width: int,
    dct: str,
    box: tuple[int, int, int, int] | None,
) -> np.ndarray:
    opened = open_image(data)
    turned = orientation(opened)
    if opened.mode not in ("RGB", "L"):  # CMYK: Pillow knows Adobe's inversion
        return np.asarray(_resize(_to_rgb(_upright(opened)), height, width, box))
    full_width, full_height = opened.size
    if box is not None and turned != 1:  # the file stores the box's pixels elsewhere
        pixels = simplejpeg.decode_jpeg(data, fastdct=dct == "fast")
        upright = Image.fromarray(pixels).transpose(UPRIGHT[turned])
        return np.asarray(_resize(upright, height, width, box))
    if turned >= 5:
        height, width = width, height
    top, left, box_height, box_width = box or (0, 0, full_height, full_width)
    scale = _scale(box_height, box_width, height, width)
    pixels = _decode_jpeg(data, full_height, full_width, scale, dct)
    # A side that is not a multiple of the scale ends within the last pixel.
    part = (top / scale, left / scale, box_height / scale, box_width / scale)
    resized = _resize(Image.fromarray(pixels), height, width, part)
    if turned in UPRIGHT:
        resized = resized.transpose(UPRIGHT[turned])
    return np.asarray(resized)


def _upright(image: Image.Image) -> Image.Image:
    method = UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel; Pillow's own convert clips
        wide = np.asarray(image).clip(0, 65535)  # keeps its type, for memory
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _resize(
    image: Image.Image,
    height: int,
    width: int,
    box: tuple[int | float, ...] | None,
) -> Image.Image:
    if image.size == (width, height) and box in (None, (0, 0, height, width)):
        return image
    if box is None:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    top, left, box_height, box_width = box
    # The file may have changed since the box was drawn.
    right, bottom = left + box_width, top + box_height
    if right > image.width or bottom > image.height:
        raise ValueError(
            f"an image of {image.height}x{image.width} pixels has no part that ends at "
            f"row {bottom:g}, column {right:g}: its size has changed"
        )
    return image.resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
