"""A video clip -> `PackedImages`: frames in groups, each group like one image."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from navit.batch import PackedImages
from navit.input import memory, pixels
from navit.plan.geometry import check_count
from navit.plan.strategies import QwenVL
from navit.sources.images import ArrayLike, ImageLike, sizes_of


def pack_video(
    frames: Sequence[ImageLike] | ArrayLike,
    *,
    patch_size: int = 14,
    frames_per_patch: int = 2,
    merge: int = 2,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 768 * 28 * 28,
    total_pixels: int = 90_316_800,
    row_tokens: int | None = None,
    together: bool = False,
    dct: str = "fast",
) -> PackedImages:
    """Packs the frames of one clip, in order of time.

    A patch has the pixels of `frames_per_patch` frames at one place, frame by frame;
    the last frame is repeated to fill the last patch. Frames are resized as Qwen2-VL's
    are: sides are multiples of `patch_size * merge`, and the area lies between
    `min_pixels` and `max_pixels`, or less if the clip would exceed `total_pixels`
    (`fetch_video` in qwen-vl-utils; its defaults).

    Args:
      frames: images of one size, or `[frames, height, width, 3]` uint8.
      total_pixels: of all groups of frames.
      row_tokens: length of a row; None: of one segment.
      together: the whole clip is one segment, so that tokens attend across time, with
        coords (time, row, column). Otherwise each group of frames is a segment, as
        Qwen's towers want it, and slots follow time.
      dct: as in `navit.input.pixels.load`.

    Raises:
      ValueError: if there are no frames, they differ in size, one cannot be decoded, or
        a segment is longer than a row.
    """
    for name, value in (
        ("patch_size", patch_size),
        ("frames_per_patch", frames_per_patch),
        ("merge", merge),
        ("min_pixels", min_pixels),
        ("max_pixels", max_pixels),
        ("total_pixels", total_pixels),
        ("row_tokens", row_tokens),
    ):
        if value is not None:
            check_count(name, value)
    if min_pixels > max_pixels:
        raise ValueError(
            f"min_pixels={min_pixels} is more than max_pixels={max_pixels}"
        )
    if isinstance(frames, str | os.PathLike):
        raise ValueError(
            f"frames is the path {str(frames)!r}, but navit decodes no video: pass its "
            "frames, as images or an array"
        )
    sizes = sizes_of(frames)
    if not len(sizes):
        raise ValueError("there are no frames to pack")
    if (sizes != sizes[0]).any():
        other = int((sizes != sizes[0]).any(-1).argmax())
        raise ValueError(
            f"frame {other} is {sizes[other].tolist()} pixels, and frame 0 "
            f"{sizes[0].tolist()}: the frames of a clip have one size"
        )
    height, width = sizes[0].tolist()
    share = total_pixels / len(sizes) * frames_per_patch
    most = int(max(min(max_pixels, share), min_pixels * 1.05))
    rule = QwenVL(
        patch_size, merge, min_pixels=min_pixels, max_pixels=most, qwen_vl_utils=True
    )
    (view,) = rule.views(height, width)
    groups = -(-len(sizes) // frames_per_patch)
    rows, columns = view.grid
    tokens = rows * columns * (groups if together else 1)
    row_tokens = tokens if row_tokens is None else row_tokens
    if tokens > row_tokens:
        raise ValueError(
            f"a segment has {tokens} tokens, more than a row of row_tokens="
            f"{row_tokens}: raise row_tokens, or lower max_pixels or total_pixels"
        )
    in_row = row_tokens // tokens
    segments = 1 if together else groups
    shape = (-(-segments // in_row), row_tokens)
    channels = frames_per_patch * patch_size**2 * 3
    memory.check(
        shape[0] * row_tokens * channels,
        f"packing a clip into {shape[0]} x {row_tokens} tokens",
        "pack fewer frames at a time, or lower max_pixels",
    )
    axes, slots = (3, 1) if together else (2, min(in_row, segments))
    packed = PackedImages(
        patches=np.zeros((*shape, channels), np.uint8),
        segment_ids=np.zeros(shape, np.int32),
        coords=np.zeros((*shape, axes), np.int32),
        grids=np.zeros((shape[0], slots, axes), np.int32),
    )
    places = np.indices((rows, columns)).reshape(2, -1).T
    for group in range(groups):
        row, slot = (0, 0) if together else divmod(group, in_row)
        start = (group if together else slot) * len(places)
        at = (row, slice(start, start + len(places)))
        numbers = group * frames_per_patch + np.arange(frames_per_patch)
        for i, number in enumerate(np.minimum(numbers, len(sizes) - 1).tolist()):
            part = packed.patches[at].reshape(len(places), frames_per_patch, -1)
            part[:, i] = _patches(
                frames, number, (height, width), view.size, patch_size, dct
            )
        packed.segment_ids[at] = slot + 1
        packed.coords[at][:, -2:] = places
        packed.grids[row, slot] = (groups, rows, columns) if together else view.grid
        if together:
            packed.coords[at][:, 0] = group
    return packed


def _patches(
    frames: Sequence[ImageLike] | ArrayLike,
    number: int,
    size: tuple[int, int],
    resized: tuple[int, int],
    patch_size: int,
    dct: str,
) -> np.ndarray:
    """One frame's patches, `[rows * columns, p*p*3]`."""
    whole = ((0, 0, *size), resized)
    try:
        (frame,) = pixels.load_parts(
            frames[number], [whole], dct=dct, resample="bicubic"
        )
    except ValueError as error:
        raise ValueError(f"frame {number} cannot be decoded: {error}") from error
    count = resized[0] * resized[1] // patch_size**2
    out = np.empty((count, patch_size**2 * 3), np.uint8)
    pixels.to_patches(frame, patch_size, out)
    return out
