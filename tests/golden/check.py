"""Opens directories that navit wrote with transformers, and compares the outputs.

  navit convert tests/golden/siglip2_a /tmp/a
  pip install torch transformers && python tests/golden/check.py /tmp/a siglip2_a

A third argument names the folder with the golden tokens, where it is another (gemma).
Fails on any warning of transformers, and on any output that is not the golden one.
"""

import logging
import pathlib
import sys
import warnings

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.utils import logging as transformers_logging

said = []


class Collect(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


def main(folder, name, tokens=None):
    warnings.simplefilter("error")
    transformers_logging.set_verbosity_warning()
    transformers_logging.get_logger("transformers").addHandler(Collect())
    transformers_logging.get_logger("transformers").propagate = False
    with np.load(pathlib.Path(__file__).parent / name / "expected.npz") as found:
        want = dict(found)
    kind = SiglipModel if "pixels" in want else Siglip2Model
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(want["ids"]).long()
        t = model.text_model(input_ids=ids).pooler_output.numpy()
        assert np.array_equal(t, want["text"])
        if kind is Siglip2Model:
            grid, patches = want["grids"][2], want["patches_2"]
            z = model.vision_model(
                pixel_values=torch.from_numpy(patches[None]),
                pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int32),
                spatial_shapes=torch.from_numpy(grid[None]).long(),
            ).pooler_output.numpy()
            assert np.array_equal(z[0], want["pooled_2"])
        elif model.config.vision_config.image_size == want["pixels"].shape[1]:
            pixels = want["pixels"].astype(np.float32) / 127.5 - 1
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            z = model.vision_model(pixel_values=pixels).pooler_output.numpy()
            assert np.array_equal(z, want["pooled"])
    # AutoProcessor wants torchvision; these are its parts without it.
    if kind is Siglip2Model:
        tokenizer = Siglip2Processor.from_pretrained(folder).tokenizer
        images = Siglip2ImageProcessorPil.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        images = SiglipImageProcessorPil.from_pretrained(folder)
    image = Image.fromarray(np.full((40, 70, 3), 90, np.uint8))
    patches = images([image], return_tensors="pt")
    golden = pathlib.Path(__file__).parent / (tokens or name)
    with np.load(golden / "tokens.npz") as found:
        texts, ids = found["texts"].tolist(), found["ids"]
    options = dict(padding="max_length", truncation=True, max_length=ids.shape[1])
    got = tokenizer(texts, **options)["input_ids"]
    assert np.array_equal(got, ids), (got, ids)
    print(type(tokenizer).__name__, {k: tuple(v.shape) for k, v in patches.items()})
    # transformers says this of the defaults of its own SiglipTextConfig, too.
    ours = [x for x in said if "between 0 and 31999" not in x]
    assert not ours, ours
    print(f"{folder}: {kind.__name__} opens it with no warning; outputs equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
