"""Measures how full planned rows are and how fast the planner is.

  python -m navit.bench.plan
  python -m navit.bench.plan --images 200000 --open-rows 8,16,64 --elastic 0.1

Images are simulated photographs: ten common aspect ratios from 9:16 to 16:9, with long
sides log-normal around 480 pixels. Padding counts every row of the epoch, including
those still open at its end. The lines below it show the share of the text tower's work
that is real captions, with one list of captions for every --caption-rows rows, and the
share of images left out to make the captions fit.

Mixes: "NaFlex" draws one of {128, 256, 576, 784, 1024} tokens for each image, "NaViT" a
side from N(-0.5, 1) on [64, 384]; "native" keeps images under 729 tokens as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

from navit.config import DataConfig, Sides
from navit.plan.batches import BatchPlans
from navit.plan.epoch import plan_block
from navit.sources.synthetic import photographs

MIXES = {
    "NaFlex": DataConfig(budgets=(128, 256, 576, 784, 1024), slots=None),
    "NaViT": DataConfig(sides=Sides(), slots=None),
    "native <= 729": DataConfig(budgets=(729,), max_upscale=1.0, slots=None),
    "256": DataConfig(budgets=(256,), slots=None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rows", default="1024,2048,4096,8192", help="row lengths")
    parser.add_argument("--open-rows", default="16")
    parser.add_argument("--caption-rows", type=int, default=8)
    parser.add_argument("--elastic", type=float, default=0.0)
    args = parser.parse_args()
    sizes = photographs(args.images)
    lengths = [int(x) for x in args.rows.split(",")]
    print(f"{args.images} images, patch 16, elastic {args.elastic:g}; padding in %")
    titles = [f"{x:>7}" for x in lengths]
    print(f"{'mix':15} {'open':>5}", *titles, "  images/s planned")
    for name, mix in MIXES.items():
        for open_rows in map(int, args.open_rows.split(",")):
            padding, filled, left_out, seconds = [], [], [], 0.0
            for row_tokens in lengths:
                data = dataclasses.replace(
                    mix,
                    row_tokens=row_tokens,
                    open_rows=open_rows,
                    elastic=args.elastic,
                    rows=args.caption_rows,
                    caption_rows=args.caption_rows,
                )
                slots = BatchPlans(sizes[:1000], data, patch_size=16, steps=1).slots
                data = dataclasses.replace(data, slots=slots)
                plans = BatchPlans(sizes[:20_000], data, patch_size=16, steps=1)
                start = time.process_time()
                rows = plan_block(
                    sizes,
                    data,
                    patch_size=16,
                    epoch=0,
                    slots=plans.slots,
                    captions=plans.captions,
                )
                seconds += time.process_time() - start
                padding.append(1 - rows.lengths.sum() / (len(rows) * row_tokens))
                filled.append(plans.captions_filled(rows))
                left_out.append(1 - len(rows.index) / len(sizes))
            rate = args.images * len(lengths) / seconds
            heads = f"{name:15} {open_rows:5}", f"{'':13}captions", f"{'':13}left out"
            ends = f"   {rate:12,.0f}", "", ""
            shares = zip(heads, (padding, filled, left_out), ends, strict=True)
            for head, values, end in shares:
                cells = " ".join(f"{100 * x:7.2f}" for x in values)
                print(f"{head} {cells}{end}", flush=True)


if __name__ == "__main__":
    main()
