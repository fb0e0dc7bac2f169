"""The kinds of image that are accepted, and their sizes from the header."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol, TypeGuard, runtime_checkable

import numpy as np
from PIL import Image

from navit.sources.storage import open_file


@runtime_checkable
class ArrayLike(Protocol):
    """An array of numpy, or of jax or torch, which convert to it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __array__(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


# A BytesIO has no name, so run-time type checks do not take it for a BinaryIO.
BinaryFile = BinaryIO | io.BytesIO

# One image: an encoded file (its contents, an open file or a path), pixels
# (`(h, w)`, `(h, w, 3)` or `(h, w, 4)` uint8), or a PIL image.
Contents = bytes | bytearray | memoryview
ImageLike = Contents | BinaryFile | str | os.PathLike[str] | ArrayLike | Image.Image

# Larger images are refused before they are decoded: Pillow's own limit, 270 MB of RGB.
MAX_PIXELS = 89_478_485

# Excludes formats that run programs (PostScript) or that photographs never use.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's readers raise for a damaged file (RuntimeError: AVIF; TypeError: TIFF).
# The warning is raised if warnings are errors.
DAMAGED = (
    OSError,
    SyntaxError,
    RuntimeError,
    TypeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def size_of(image: ImageLike) -> tuple[int, int]:
    """(height, width) in pixels, upright (EXIF applied).

    Reads only the header of a file.

    Raises:
      ValueError: if this is not an image, or is too large to decode safely.
      OSError: if its file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        with open_file(os.path.expanduser(image)) as file:
            return size_of(file)
    if not _is_file(image):
        image = standard(image)
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if _is_file(image) and (found := _webp_size(image)) is not None:
        return found
    opened = image if isinstance(image, Image.Image) else open_image(image)
    width, height = opened.size
    return (width, height) if orientation(opened) >= 5 else (height, width)


def sizes_of(images: Sequence[ImageLike] | ArrayLike) -> np.ndarray:
    """`size_of` each image: int64 `[len, 2]` (height, width).

    Raises:
      TypeError: if `images` is neither a list nor an image.
      ValueError: if `images` is a single image, or if one cannot be read; names it.
    """
    if (
        isinstance(images, Contents | str | os.PathLike | Image.Image)
        or _is_file(images)
        or len(getattr(images, "shape", ())) in (2, 3)
    ):
        shown = images if isinstance(images, str | os.PathLike) else type(images)
        raise ValueError(
            f"expected a list of images, not one image ({shown!r}): pass [image]"
        )
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(
            f"images is {images!r}, but should be a list: pass one such as [image]"
        )
    sizes = np.zeros((len(images), 2), np.int64)
    for i in range(len(images)):
        try:
            sizes[i] = size_of(images[i])
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{image_name(images, i)} cannot be read: {error}"
            ) from error
    return sizes


def image_name(images: Sequence[ImageLike] | ArrayLike, index: int) -> str:
    """An image for a message: its index, and its path if it has one."""
    image = images[index]
    path = f" ({image})" if isinstance(image, str | os.PathLike) else ""
    return f"image {index}{path}"


def open_image(data: bytes | BinaryFile) -> Image.Image:
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        opened = Image.open(file, formats=_FORMATS)
    except DAMAGED as error:
        reason = str(error) if "identify" not in str(error) else "not an image file"
        raise ValueError(reason) from error
    _check_pixels(*opened.size)
    return opened


def _webp_size(file: BinaryFile) -> tuple[int, int] | None:
    """(height, width) of a WebP (RFC 9649) by its header; Pillow reads the whole file.

    None if it is something else, or has EXIF or XMP, which are at its end and may turn
    it.
    """
    file.seek(0)
    head = file.read(30)
    file.seek(0)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind, byte = head[12:16], head[20]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width = int.from_bytes(head[26:28], "little") & 0x3FFF
        height = int.from_bytes(head[28:30], "little") & 0x3FFF
    elif kind == b"VP8L" and byte == 0x2F:
        both = int.from_bytes(head[21:25], "little")
        width, height = (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X" and not byte & 0x0C:
        width = int.from_bytes(head[24:27], "little") + 1
        height = int.from_bytes(head[27:30], "little") + 1
    else:
        return None
    if not width or not height:
        return None
    _check_pixels(width, height)
    return height, width


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels is over the limit of {MAX_PIXELS}")


def orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself, when it opens and loads
        return 1
    try:
        # Not PngImageFile.getexif, which decodes the pixels to look behind them.
        exif = Image.Image.getexif(image)
        value = int(exif.get(_EXIF_ORIENTATION, 1))
        return value if value in UPRIGHT else 1
    except (OSError, SyntaxError, ValueError, TypeError):  # damaged EXIF: as stored
        return 1


def _is_file(image: Any) -> TypeGuard[BinaryFile]:
    if isinstance(image, io.TextIOBase):
        raise ValueError('the file is open as text: open it with mode "rb"')
    return hasattr(image, "read")


def standard(image: ImageLike) -> bytes | np.ndarray | Image.Image:
    """Turns any kind of image into an encoded file, an array or a PIL image."""
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        with open_file(os.path.expanduser(image)) as file:
            return file.read()
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
