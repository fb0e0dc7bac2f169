"""Makes `rotary.npz`: rotary angles by transformers' own modules, at released sizes.

pip install torch transformers && python tests/golden/make_rotary.py

It has `positions` (row, column), and for each released head width the float32 angles
there, their cosines and sines: one for each pair of channels.
"""

import numpy as np
import torch
from encoders import HERE
from transformers import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding


def rotary():
    """Angles, cosines and sines by transformers' own modules, at released sizes."""
    places = np.random.default_rng(0).integers(0, 512, (12, 2))
    places = torch.from_numpy(np.concatenate([[[0, 0], [1, 0], [0, 1]], places]))
    out = {"positions": places.numpy().astype(np.int32)}
    for name, Module, config in (
        ("qwen_80", Qwen2VLVisionRotaryEmbedding, Qwen2VLVisionConfig()),
        ("qwen_72", Qwen3VLVisionRotaryEmbedding, Qwen3VLVisionConfig()),
        ("pixtral_64", PixtralVisionRotaryEmbedding, PixtralVisionConfig()),
        (
            "pixtral_88",
            PixtralVisionRotaryEmbedding,
            PixtralVisionConfig(hidden_size=1408),
        ),
    ):
        module = Module(config)
        angles = places[..., None].float() * module.inv_freq
        angles = module.recomposition_frequencies(angles)
        cos, sin = module(torch.zeros(1), places)
        assert (cos == angles.cos()).all() and (sin == angles.sin()).all()
        for part, value in (("angles", angles), ("cos", cos), ("sin", sin)):
            out[f"{name}_{part}"] = value.chunk(2, -1)[0].numpy()
    np.savez_compressed(HERE / "rotary.npz", **out)


if __name__ == "__main__":
    rotary()
