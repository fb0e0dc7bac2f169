"""Images become the pixels that the releases' own processors make of them."""

import json

import jax.numpy as jnp
import numpy as np
import PIL
import pytest

import navit
from navit.model.patch import normalized
from navit.weights import read
from tests.convert.test_convert import GOLDEN
from tests.convert.test_tower_files import copy
from tests.convert.test_tower_settings import CONFIG, PIXELS, state

# The release in processors.npz -> its golden tower, and settings of its config.json.
RELEASES = {
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen3_vl": ("qwen3_vl", {}),
    "pixtral": ("pixtral", {}),
    "mistral": ("pixtral", {"/spatial_merge_size": 2}),
    "kimi_k25": ("kimi_vl", {}),
    "ovis2_5": ("ovis2_5", {}),
    "timm": ("timm_gap", {"/pretrained_cfg": {"tag": "s60"}}),
}


@pytest.mark.parametrize("release", RELEASES)
def test_pixels_equal_the_processors(release, tmp_path):
    """Of images that are enlarged, shrunk, padded or left as they are."""
    name, settings = RELEASES[release]
    folder = copy(name, tmp_path)
    state(folder, CONFIG, settings)
    with np.load(GOLDEN / "processors.npz") as found:
        want = {key: found[key] for key in found if key.startswith(release)}
        images = [found[f"image_{i}"] for i in range(4)]
        made_with = str(found["pillow"])
    if data := json.loads(str(want[f"{release}_json"])):
        (folder / PIXELS).write_text(json.dumps(data))
    weights = read(folder)
    v = weights.model.vision
    packed, index = navit.pack(
        images,
        patch_size=v.patch_size,
        strategy=weights.strategy,
        row_tokens=256,
        slots=1,
        return_index=True,
    )
    real = jnp.asarray(packed.segment_ids > 0)[..., None]
    inputs = np.asarray(normalized(jnp.asarray(packed.patches), real, v))
    # Kimi-K2.5's resizes with torchvision, and Pillow's versions round differently.
    slack = int(release == "kimi_k25" or PIL.__version__ != made_with)
    side = v.patch_size
    for row, (i, _) in enumerate(index[:, 0]):
        rows, columns = packed.grids[row, 0]

        def image(x, rows=rows, columns=columns):
            x = x[: rows * columns].reshape(rows, columns, side, side, 3)
            return x.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)

        levels, floats = image(packed.patches[row]), image(inputs[row])
        off = np.abs(levels.astype(int) - want[f"{release}_{i}"])
        assert off.max() <= slack, f"image {i}: {off.max()} grey levels off"
        row_off = np.abs(floats[0] - want[f"{release}_row_{i}"])
        assert row_off.max() <= 2e-6 + slack / 255 / min(v.std)
