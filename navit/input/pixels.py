"""Encoded image -> upright RGB -> resized to its grid -> patches, in place in a row."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard, runtime_checkable

import numpy as np
import simplejpeg
from PIL import Image


@runtime_checkable
class ArrayLike(Protocol):
    """An array of numpy, or of jax or torch, which convert to it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __array__(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


# A BytesIO has no name, so it is no BinaryIO where types are checked at run time.
BinaryFile = BinaryIO | io.BytesIO

# One image: an encoded file (its contents, an open file or a path), pixels
# (`(h, w)`, `(h, w, 3)` or `(h, w, 4)` uint8), or a PIL image.
Contents = bytes | bytearray | memoryview
ImageLike = Contents | BinaryFile | str | os.PathLike[str] | ArrayLike | Image.Image

# Larger images are refused before they are decoded: Pillow's own limit, 270 MB of RGB.
MAX_PIXELS = 89_478_485

# No format that runs programs (PostScript) or that photographs never come in.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")

# JPEG decoding can halve the image up to three times at no cost. Each halving must
# leave this many source pixels per target pixel, so that the antialiased resize still
# does the filtering: at 256 tokens within about 9 grey levels of the full decode.
_DCT_MARGIN = 2.0

# What Pillow's readers raise for a damaged file (RuntimeError: AVIF; TypeError: TIFF);
# a bomb's warning is one where warnings are errors.
_DAMAGED = (
    OSError,
    SyntaxError,
    RuntimeError,
    TypeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def size_of(image: ImageLike) -> tuple[int, int]:
    """(height, width) in pixels, upright (EXIF applied), from the header alone.

    Of a file, no more than the header is read.

    Raises:
      ValueError: if this is no image, or one too large to decode safely.
      OSError: if its file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        with Path(image).expanduser().open("rb") as file:
            return size_of(file)
    if not _is_file(image):
        image = _standard(image)
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    opened = image if isinstance(image, Image.Image) else _open(image)
    width, height = opened.size
    return (width, height) if _orientation(opened) >= 5 else (height, width)


def sizes_of(images: Sequence[ImageLike] | ArrayLike) -> np.ndarray:
    """`size_of` each: int `[len, 2]` (height, width).

    Raises:
      ValueError: for one image in place of several, or names the first that cannot be
        read.
    """
    if (
        isinstance(images, Contents | str | os.PathLike | Image.Image)
        or _is_file(images)
        or len(getattr(images, "shape", ())) in (2, 3)
    ):
        raise ValueError("expected a list of images, not one image: pass [image]")
    sizes = np.zeros((len(images), 2), np.int64)
    for i in range(len(images)):
        try:
            sizes[i] = size_of(images[i])
        except (ValueError, OSError) as error:
            raise ValueError(f"image {i} cannot be read: {error}") from error
    return sizes


def load(
    image: ImageLike,
    height: int,
    width: int,
    *,
    dct: str = "fast",
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Decodes and resizes to `[height, width, 3]` uint8 RGB, upright.

    The resize is bilinear with antialiasing, as big_vision, transformers and Pillow do
    it. Transparency is laid over white.

    Args:
      dct: the JPEG inverse transform: "fast" is bit-exact with TensorFlow's default,
        hence big_vision's; "accurate" with Pillow's, hence transformers'.
      box: (top, left, height, width) of the part to take, in upright pixels; None takes
        all. At its edges the resize sees the pixels beyond, where there are any.

    Raises:
      ValueError: if the image cannot be decoded.
    """
    if dct not in ("fast", "accurate"):
        raise ValueError(f'dct is "fast" or "accurate", not {dct!r}')
    try:
        image = _standard(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, bytes):
            if simplejpeg.is_jpeg(image):
                return _load_jpeg(image, height, width, dct, box)
            image = _open(image)
        return np.asarray(_resize(_to_rgb(_upright(image)), height, width, box))
    except _DAMAGED as error:
        raise ValueError(str(error)) from error


def to_patches(pixels: np.ndarray, patch_size: int, out: np.ndarray) -> None:
    """Cuts `[rows*p, columns*p, 3]` uint8 pixels into `out` `[rows*columns, p*p*3]`.

    `out` must be contiguous; it is a stretch of a packed row, so this is the only copy.
    """
    p = patch_size
    rows, columns = pixels.shape[0] // p, pixels.shape[1] // p
    # One item is a line of a patch, p*3 bytes: moving those whole is 3 times as fast
    # as moving bytes.
    line = np.dtype(f"V{p * 3}")
    lines = np.ascontiguousarray(pixels).reshape(rows, p, columns * p * 3).view(line)
    out.view(line).reshape(rows, columns, p)[...] = lines.transpose(0, 2, 1)


def _load_jpeg(
    data: bytes,
    height: int,
    width: int,
    dct: str,
    box: tuple[int, int, int, int] | None,
) -> np.ndarray:
    opened = _open(data)
    orientation = _orientation(opened)
    if opened.mode not in ("RGB", "L"):  # CMYK: Pillow knows Adobe's inversion
        return np.asarray(_resize(_to_rgb(_upright(opened)), height, width, box))
    full_width, full_height = opened.size
    if box is not None and orientation != 1:  # its pixels lie otherwise in the file
        pixels = simplejpeg.decode_jpeg(data, fastdct=dct == "fast")
        upright = Image.fromarray(pixels).transpose(_UPRIGHT[orientation])
        return np.asarray(_resize(upright, height, width, box))
    if orientation >= 5:
        height, width = width, height
    top, left, box_height, box_width = box or (0, 0, full_height, full_width)
    scale = 1
    while (
        scale < 8
        and box_height >= _DCT_MARGIN * 2 * scale * height
        and box_width >= _DCT_MARGIN * 2 * scale * width
    ):
        scale *= 2
    scaled: dict[str, Any] = {}
    if scale > 1:
        scaled = dict(
            min_height=-(-full_height // scale),
            min_width=-(-full_width // scale),
            min_factor=scale,
        )
    pixels = simplejpeg.decode_jpeg(data, fastdct=dct == "fast", **scaled)
    # A side that is no multiple of the scale ends within the last pixel.
    part = (top / scale, left / scale, box_height / scale, box_width / scale)
    resized = _resize(Image.fromarray(pixels), height, width, part)
    if orientation in _UPRIGHT:
        resized = resized.transpose(_UPRIGHT[orientation])
    return np.asarray(resized)


def _is_file(image: Any) -> TypeGuard[BinaryFile]:
    if isinstance(image, io.TextIOBase):
        raise ValueError('the file is open as text: open it with mode "rb"')
    return hasattr(image, "read")


def _standard(image: ImageLike) -> bytes | np.ndarray | Image.Image:
    """Any kind of image as one of three: an encoded file, an array, a PIL image."""
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).expanduser().read_bytes()
    if _is_file(image):
        image.seek(0)
        return image.read()
    if not hasattr(image, "__array__"):
        raise ValueError(
            "an image is a file's contents, an open file, a path, an array or a PIL "
            f"image, not a {type(image).__name__}"
        )
    try:
        array = np.asarray(image)
    except (TypeError, RuntimeError) as error:  # torch: on a GPU, or with a gradient
        kind = type(image).__name__
        raise ValueError(f"a {kind} did not convert to numpy: {error}") from error
    _check_array(array)
    return array


def _open(data: bytes | BinaryFile) -> Image.Image:
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        opened = Image.open(file, formats=_FORMATS)
    except _DAMAGED as error:
        reason = str(error) if "identify" not in str(error) else "not an image file"
        raise ValueError(reason) from error
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(
            f"{opened.width}x{opened.height} pixels is over the limit of {MAX_PIXELS}"
        )
    return opened


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself, when it opens and loads
        return 1
    try:
        # Not PngImageFile.getexif, which decodes the image to look behind its pixels.
        exif = Image.Image.getexif(image)
        found = int(exif.get(_EXIF_ORIENTATION, 1))
        return found if found in _UPRIGHT else 1
    except (OSError, SyntaxError, ValueError, TypeError):  # damaged EXIF: as stored
        return 1


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel; Pillow's own convert clips
        wide = np.asarray(image).clip(0, 65535)  # never wider than it is: memory
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
    # The file may be another than the one that the box was drawn for.
    right, bottom = left + box_width, top + box_height
    if right > image.width or bottom > image.height:
        raise ValueError(
            f"an image of {image.height}x{image.width} pixels has no part that ends at "
            f"row {bottom:g}, column {right:g}: its size has changed"
        )
    return image.resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )


def _check_array(image: np.ndarray) -> None:
    if 0 in image.shape:
        raise ValueError(f"an image of shape {image.shape} has no pixels")
    channels = image.shape[2] if image.ndim == 3 else 0
    if image.dtype == np.uint8 and (image.ndim == 2 or channels in (3, 4)):
        return
    remedies = []
    if image.ndim == 3 and channels not in (3, 4) and image.shape[0] in (3, 4):
        remedies += [
            "move the channels last with transpose(1, 2, 0), or permute in torch"
        ]
    if image.dtype.kind == "f":
        remedies += ["convert values in [0, 1] with (image * 255).round() to uint8"]
    raise ValueError(
        "an image array must be uint8 of shape (h, w), (h, w, 3) or (h, w, 4), not "
        f"{image.dtype} {image.shape}"
        + (f": {'; '.join(remedies)}" if remedies else "")
    )
