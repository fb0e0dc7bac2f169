"""Images a second from JPEG bytes to embeddings; compared to transformers if installed.

  python -m navit.bench.embedding                     # only navit
  pip install torch transformers && python -m navit.bench.embedding --rounds 5

Both sides use the same weights (B/16, random), the photographs of data/sample in mixed
shapes, and the same cores. They take turns, and the median of the rounds counts.
"whole" starts at JPEG bytes, "model" at prepared patches. A ratio above 1 means that
navit is faster: by the clock, and by the processor time of all threads, which other
work on the machine disturbs less. transformers runs its own processor (Pillow) and
model in float32, with batches of --batch images. On a GPU, where this has not been run,
both sides are in bfloat16.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from navit import weights
from navit.bench.provenance import provenance
from navit.config import Config, ModelConfig
from navit.convert.stored import Weights, shapes_of
from navit.embed_batches import rows_at_once
from navit.embed_rows import embed_packed
from navit.input import pack_images
from navit.model import variants

SAMPLE = Path(__file__).parents[2] / "data/sample"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="B", help="Ti, S, B, L or So400m")
    parser.add_argument("--budgets", default="256,1024")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument(
        "--batch", type=int, default=8, help="batch size of transformers"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--side",
        type=int,
        help="enlarge the photographs to this longer side, such as 4000 for a camera",
    )
    args = parser.parse_args()
    # Otherwise jax takes most of a GPU's memory at its start, and PyTorch lacks it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(provenance())
    files = sorted(SAMPLE.glob("*.jpg"))
    photographs = [file.read_bytes() for file in files]
    if args.side:
        photographs = [_enlarged(data, args.side) for data in photographs]
    images = [photographs[i % len(files)] for i in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        weights.write(_random(args.size), path, "huggingface", config=Config())
        ours = weights.load(path)
        theirs = _transformers(path, args.batch)
        for budget in map(int, args.budgets.split(",")):
            sides = {"navit": _navit(ours, images, budget)}
            if theirs:
                sides["transformers"] = theirs(images, budget)
            _report(sides, budget, args.images, args.rounds)


def _enlarged(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        size = [round(x * side / max(image.size)) for x in image.size]
        exif = image.getexif()  # which way is up
        buffer = io.BytesIO()
        image.resize((size[0], size[1]), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=88, exif=exif
        )
    return buffer.getvalue()


# The calls to time, by name: "whole" and "model". They take no arguments.
Side = dict[str, Callable[[], np.ndarray]]


def _navit(model: Any, images: list[bytes], budget: int) -> Side:
    packed = pack_images.pack(images, max_tokens=budget, row_tokens=budget, slots=1)
    rows = rows_at_once(model.config, budget, len(packed.grids))
    parts = [
        jax.tree.map(lambda x, i=i: x[i : i + rows], packed)
        for i in range(0, len(packed.grids), rows)
    ]

    def embed() -> np.ndarray:
        vectors = [embed_packed(model.vision, part, budget, True) for part in parts]
        return np.concatenate([np.asarray(x)[:, 0] for x in vectors])

    return {"whole": lambda: model.embed_images(images, budget), "model": embed}


def _transformers(path: Path, batch: int) -> Callable[..., Side] | None:
    try:
        import torch
        from PIL import ImageOps
        from transformers import Siglip2ImageProcessorPil, Siglip2Model
    except ImportError:
        print("torch and transformers are not installed: measuring only navit")
        return None
    on_gpu = jax.default_backend() == "gpu"
    where = dict(device="cuda", dtype=torch.bfloat16) if on_gpu else {}
    model = Siglip2Model.from_pretrained(path).eval().to(**where)
    processor = Siglip2ImageProcessorPil.from_pretrained(path)

    def prepare(images: list[bytes], budget: int) -> list[Any]:
        opened = [
            ImageOps.exif_transpose(Image.open(io.BytesIO(x))).convert("RGB")
            for x in images
        ]
        return [
            processor(
                opened[i : i + batch], max_num_patches=budget, return_tensors="pt"
            )
            for i in range(0, len(opened), batch)
        ]

    def forward(parts: list[Any]) -> np.ndarray:
        with torch.no_grad():
            pooled = [
                model.vision_model(**part.to(**where)).pooler_output for part in parts
            ]
        z = torch.cat(pooled).float().cpu()
        return (z / z.norm(dim=-1, keepdim=True)).numpy()

    def side(images: list[bytes], budget: int) -> Side:
        prepared = prepare(images, budget)
        return {
            "whole": lambda: forward(prepare(images, budget)),
            "model": lambda: forward(prepared),
        }

    return side


def _report(sides: dict[str, Side], budget: int, count: int, rounds: int) -> None:
    vectors = {}
    for name, side in sides.items():
        for what, call in side.items():
            vectors[name, what] = call()  # compiles and warms up
    if len(sides) > 1:
        a, b = (vectors[name, "whole"] for name in sides)
        print(f"{budget:5} tokens  smallest cosine {(a * b).sum(-1).min():.4f}")
    for what in ("whole", "model"):
        times: dict[str, list[float]] = {name: [] for name in sides}
        busy: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                start, used = time.perf_counter(), time.process_time()
                side[what]()
                times[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - used)
        medians = {name: count / statistics.median(x) for name, x in times.items()}
        text = "  ".join(
            f"{name} {rate:6.2f} images/s" for name, rate in medians.items()
        )
        if len(sides) > 1:
            text += f"  ratio {medians['navit'] / medians['transformers']:.2f}"
            ours, theirs = (statistics.median(x) for x in busy.values())
            text += f", by processor time {theirs / ours:.2f}"
        print(f"{budget:5} tokens  {what:5}  {text}", flush=True)


def _random(size: str) -> Weights:
    model = ModelConfig(
        vision=variants.vision(f"{size}/16"),
        text=variants.text(size, depth=1, vocab_size=1000, length=64, tokenizer=None),
    )
    shapes = shapes_of(model)
    rng = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        value = rng.standard_normal(shapes[name], np.float32)
        value *= 0.5 * shapes[name][-2] ** -0.5 if len(shapes[name]) > 1 else 0.1
        return value + ("norm" in name and name.endswith("scale"))

    return Weights(model, read, where="random weights")


if __name__ == "__main__":
    main()
