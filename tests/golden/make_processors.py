"""Makes processors.npz: pixels by the image processors of transformers and of timm.

  pip install torch torchvision transformers timm && \
      python tests/golden/make_processors.py

For each release: its processor's file as transformers writes it (`NAME_json`), and for
image i (`image_i`) the resized pixels as uint8 (`NAME_i`) and the first row of them as
the tower gets it (`NAME_row_i`). Patches are 4 pixels wide, so that the file stays
small. Ovis2.5's own processor is Siglip's, with the size that its code computes.
"""

import json
import pathlib

import numpy as np
import PIL
from PIL import Image
from timm.data import create_transform
from transformers import (
    Kimi_K25ImageProcessor,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

PATCH = 4
SIZES = [(23, 37), (9, 61), (70, 44), (8, 8)]
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def whole(patches, rows, columns, block):
    """`[n, c, p, p]` patches, in blocks of `block` x `block`, as one image."""
    x = patches.reshape(
        rows // block, columns // block, block, block, 3, PATCH, PATCH
    ).transpose(0, 2, 5, 1, 3, 6, 4)
    return x.reshape(rows * PATCH, columns * PATCH, 3)


def qwen(processor):
    def pixels(image):
        out = processor(image, return_tensors="np")
        _, rows, columns = out["image_grid_thw"][0]
        x = out["pixel_values"].reshape(len(out["pixel_values"]), 3, 2, PATCH, PATCH)
        assert (x[:, :, 0] == x[:, :, 1]).all()
        return whole(x[:, :, 0], rows, columns, 2)

    return pixels


def kimi(processor):
    def pixels(image):
        out = processor(image, return_tensors="np")
        _, rows, columns = out["image_grid_thw"][0]
        return whole(np.asarray(out["pixel_values"]), rows, columns, 1)

    return pixels


def channels_last(processor, **options):
    def pixels(image):
        out = processor(image, return_tensors="np", **options)["pixel_values"][0]
        return np.asarray(out).transpose(1, 2, 0)

    return pixels


def ovis(processor, low, high):
    def pixels(image):
        size = smart_resize(*image.shape[:2], 2 * PATCH, low, high)
        size = dict(zip(("height", "width"), size, strict=True))
        return channels_last(processor, size=size)(image)

    return pixels


def timm(most):
    transform = create_transform(
        (PATCH, PATCH),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        naflex=True,
        patch_size=PATCH,
        max_seq_len=most,
    )
    return lambda image: transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)


def main():
    rng = np.random.default_rng(0)
    found = {"pillow": np.array(PIL.__version__)}
    for i, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width][..., None] / 9
        waves = np.sin(y * rng.uniform(-2, 2, 3) + x * rng.uniform(-2, 2, 3)) * 90
        noise = rng.normal(128, 20, (height, width, 3))
        found[f"image_{i}"] = (waves + noise).clip(0, 255).astype(np.uint8)
    low, high = 16 * PATCH**2, 60 * PATCH**2
    size = {"shortest_edge": low, "longest_edge": high}
    qwen2 = Qwen2VLImageProcessorPil(patch_size=PATCH, size=size)
    qwen3 = Qwen2VLImageProcessorPil(patch_size=PATCH, size=size, **HALF)
    pixtral = PixtralImageProcessorPil(
        patch_size={"height": PATCH, "width": PATCH}, size={"longest_edge": 40}
    )
    k25 = Kimi_K25ImageProcessor(patch_size=PATCH, max_patches=60)
    siglip = SiglipImageProcessorPil(resample=2, **HALF)
    for name, processor, pixels in (
        ("qwen2_vl", qwen2, qwen(qwen2)),
        ("qwen3_vl", qwen3, qwen(qwen3)),
        ("pixtral", pixtral, channels_last(pixtral)),
        ("mistral", pixtral, channels_last(pixtral, patch_size=2 * PATCH)),
        ("kimi_k25", k25, kimi(k25)),
        ("ovis2_5", siglip, ovis(siglip, low, high)),
        ("timm", None, timm(60)),
    ):
        data = json.loads(processor.to_json_string()) if processor else {}
        if name == "ovis2_5":
            data |= dict(min_pixels=low, max_pixels=high)
        found[f"{name}_json"] = np.array(json.dumps(data))
        mean = np.array(data.get("image_mean", [0.5] * 3))
        std = np.array(data.get("image_std", [0.5] * 3))
        for i in range(len(SIZES)):
            x = pixels(found[f"image_{i}"])
            found[f"{name}_row_{i}"] = x[0].astype(np.float32)
            levels = (x * std + mean) * 255
            assert np.abs(levels - levels.round()).max() < 1e-3
            found[f"{name}_{i}"] = levels.round().astype(np.uint8)
    file = pathlib.Path(__file__).with_name("processors.npz")
    np.savez_compressed(file, **found)


if __name__ == "__main__":
    main()
