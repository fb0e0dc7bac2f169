"""Makes pixels.npz: big_vision's pixels, by TensorFlow itself, and transformers' grids.

  pip install tensorflow-cpu torch transformers && python tests/golden/make_pixels.py

big_vision decodes with tf.io.decode_jpeg and resizes with tf.image.resize (bilinear,
antialias=True); see its pp/proj/image_text/ops_naflex.py. Patches are 2 pixels wide
here, so that the file stays small.
"""

import io
import pathlib

import numpy as np
import tensorflow as tf
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

BUDGETS = (64, 256, 729, 1024)
PATCH = 2


def photograph(rng, height, width):
    """Something with edges, gradients and texture, as a JPEG."""
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * y + b * x + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    image = np.stack(waves, -1) * 80 + 128 + rng.normal(0, 8, (height, width, 3))
    h, w = height // 3, width // 3
    image[h : 2 * h, w : 2 * w] = rng.uniform(0, 255, 3)
    out = io.BytesIO()
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    picture.save(out, "JPEG", quality=int(rng.integers(70, 96)))
    return out.getvalue()


def main():
    rng = np.random.default_rng(0)
    found = {}
    sizes = np.exp(rng.uniform(0, np.log(4000), (250, 2))).astype(np.int64).clip(1)
    found["grid_sizes"] = sizes
    found["grids"] = np.array(
        [
            [[s // 16 for s in get_image_size_for_max_num_patches(h, w, 16, n)]
             for n in BUDGETS]
            for h, w in sizes.tolist()
        ]
    )  # fmt: skip
    for i in range(200):
        height, width = np.exp(rng.uniform(np.log(8), np.log(160), 2)).astype(int)
        data, budget = photograph(rng, height, width), BUDGETS[i % 4]
        target = get_image_size_for_max_num_patches(height, width, PATCH, budget)
        image = tf.cast(tf.io.decode_jpeg(data, channels=3), tf.float32)
        image = tf.image.resize(image, target, method="bilinear", antialias=True)
        found[f"jpeg_{i}"] = np.frombuffer(data, np.uint8)
        # To a sixteenth of a grey level, so that it fits 16 bits.
        found[f"pixels_{i}"] = np.round(image.numpy() * 16).astype(np.uint16)
    file = pathlib.Path(__file__).with_name("pixels.npz")
    np.savez_compressed(file, **found)


if __name__ == "__main__":
    main()
