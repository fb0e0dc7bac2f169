"""big_vision's two-tower `.npz` files: NaFlex or one resolution, scanned or not."""

from __future__ import annotations

import functools
import io
import logging
import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from navit.config import ModelConfig, PositionConfig, TextConfig, VisionConfig
from navit.convert import codec, tensors, tokenizers
from navit.convert.stored import (
    Weights,
    check_expressible,
    depth_of,
    shape_of,
    square_side,
)
from navit.files import replacing, write_atomic

log = logging.getLogger("navit")

_IMG, _TXT = "params/img/Transformer/encoderblock", "params/txt/Encoder_0/encoderblock"

# What zipfile raises if a file is damaged, encrypted or compressed in an unknown way.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
)


def is_big_vision(path: Path) -> bool:
    """Whether `path` is an .npz, by content or, for a damaged file, by suffix."""
    return path.is_file() and (path.suffix == ".npz" or zipfile.is_zipfile(path))


def read(path: Path) -> Weights:
    """Opens a file; every size comes from its tensors.

    They do not show the size of images that are not a whole number of patches: load
    so400m-patch14-384 with `model.vision.image_size=384`.

    Raises:
      ValueError: names a tensor that is missing, surplus, pickled, or of another shape
        or type.
    """
    stored = _shapes(path)
    model = _model(path, stored)
    scanned = [f"{prefix}/LayerNorm_0/scale" in stored for prefix in (_IMG, _TXT)]
    table = tensors.big_vision(
        model, scanned_vision=scanned[0], scanned_text=scanned[1]
    )
    codec.check(path, table, model, stored)
    get = codec.reader(table, model, lambda name: _load(path, name))
    return Weights(model, get, str(path), tokenizers.found_in(path.parent))


def write(weights: Weights, out: Path) -> None:
    """Writes the layout of the public NaFlex files: only the text tower is scanned.

    Raises:
      ValueError: names a setting that the format lacks.
    """
    model = weights.model
    check_expressible(model, "big_vision's two-tower format", embed_dim=True)
    assert model.text is not None
    if side := model.vision.image_size:
        log.warning(
            "an .npz does not record that images are %d pixels a side: load %s with "
            "model.vision.image_size=%d",
            side,
            out,
            side,
        )
    table = tensors.big_vision(model, scanned_vision=False, scanned_text=True)
    beside = tokenizers.contents(weights)
    with (
        replacing(out) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
    ):
        for name, value in codec.encoded(table, weights):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value)
    for name, data in beside.items():
        tokenizer = out.with_name(name)
        if not tokenizer.exists():
            write_atomic(tokenizer, data)
        elif tokenizer.read_bytes() != data:
            log.warning(
                "%s differs from this model's tokenizer, %s, and is not overwritten",
                tokenizer,
                model.text.tokenizer,
            )


def _model(path: Path, stored: dict[str, tuple[int, ...]]) -> ModelConfig:
    shape = functools.partial(shape_of, path, stored)

    def tower(prefix: str) -> dict[str, Any]:
        scanned = f"{prefix}/LayerNorm_0/scale" in stored
        first = prefix if scanned else f"{prefix}_0"
        up = shape(f"{first}/MlpBlock_0/Dense_0/kernel", 2 + scanned)
        name = f"{first}/MultiHeadDotProductAttention_0/query/kernel"
        query = shape(name, 3 + scanned)
        depth = up[0] if scanned else depth_of(stored, rf"{prefix}_(\d+)/")
        return dict(width=up[-2], depth=depth, mlp_dim=up[-1], num_heads=query[-2])

    kernel = shape("params/img/embedding/kernel", 2, 4)
    fixed = len(kernel) == 4
    table = shape("params/img/pos_embedding", 3)
    name = "params/img/pos_embedding"
    if fixed:
        side = square_side(path, name, table[1])
    elif table[0] != table[1]:
        raise ValueError(f"{path}: {name} is {table}, which is not square")
    else:
        side = table[0]
    head = "params/img/head/kernel"
    vocab, _ = shape("params/txt/Embed_0/embedding", 2)
    _, length, _ = shape("params/txt/pos_embedding", 3)
    return ModelConfig(
        vision=VisionConfig(
            patch_size=kernel[0] if fixed else math.isqrt(kernel[0] // 3),
            position=PositionConfig(size=side),
            fixed_grid=fixed,
            embed_dim=shape(head, 2)[-1] if head in stored else None,
            **tower(_IMG),
        ),
        text=TextConfig(tokenizer=None, vocab_size=vocab, length=length, **tower(_TXT)),
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads names and shapes from the members' headers, without the tensors."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if {"names.npy", "embeddings.npy"} == set(archive.namelist()):
                raise ValueError(
                    f"{path} holds embeddings from navit embed, not a model: "
                    "name the weights that computed them"
                )
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                with archive.open(member) as file:
                    shape, dtype = _header(file.read(4096))
                if dtype.hasobject:
                    raise ValueError(
                        f"{path}: {name} is a pickled object, which could run code; "
                        "save it as a plain array"
                    )
                if dtype.name not in ("float32", "float16", "bfloat16", "void16"):
                    raise ValueError(
                        f"{path}: {name} is {dtype}, but weights must be float32, "
                        "float16 or bfloat16"
                    )
                shapes[name] = shape
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from None
    return shapes


def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise OSError(f"not a numpy array: {error}") from None
    return shape, dtype


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            value = archive[name]
    except (*_DAMAGED, ValueError) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from None
    if value.dtype.kind == "V":  # numpy has no bfloat16: the upper half of a float32
        wide = value.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32)
    return value.astype(np.float32, copy=False)
