"""The two attention kernels: forward and backward (Pallas, for TPUs).

Logits are transposed, `[keys, queries]`. The maximum of the softmax and the running
statistics are then rows that fit in a few registers. The results with `width` channels
(values, and the gradients of queries, keys and values) are products of a narrow matrix
with the large matrix of weights, and the matrix unit holds the large one. At 64
channels a head, this keeps a TPU's matrix units twice as busy as the usual layout.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from navit.kernels.splash_blocks import LANES, SUBLANES, Call, dot

LOG2E = math.log2(math.e)
# The maximum before the first block: below any logit, and above `HIDDEN`, so that
# exp(HIDDEN - maximum) is 0 even where all pairs so far are masked.
_LOWEST = -1e30


def _scaled(call: Call, q: Any) -> Array:
    """Queries scaled for logits to base 2, rounded once, the same in both kernels.

    Rounding the factor itself to bfloat16 would change every logit by up to 0.4 %.
    """
    return (q[...].astype(jnp.float32) * (call.scale * LOG2E)).astype(call.dtype)


def forward_kernel(
    call: Call, bounds: Any, across: Any, down: Any, q: Any, k: Any, v: Any, *out: Any
) -> None:
    """Writes a block's outputs, and the logarithms to base 2 of its softmax sums."""
    g, width, chunk = call.blocks.heads, call.width, call.blocks.chunk
    chunks = call.cut(chunk)
    work = [(h, c) for h in range(g) for c in chunks]
    scaled = _scaled(call, q)
    qt = [call.head_below(scaled, h) for h in range(g)]

    def visit(keys: Any, carry: Any) -> Any:
        kb, vb, key_ids = call.load(k, keys), call.load(v, keys), down[keys]
        # Rows of ones sum the weights in the same product.
        ones = jnp.ones((2 * SUBLANES, key_ids.shape[0]), call.dtype)
        vt = [jnp.concatenate([call.head_below(vb, h), ones]) for h in range(g)]

        def logits(h: int, c: slice) -> Array:
            return call.logits(call.head(kb, h), qt[h][:, c], across[:1, c], key_ids)

        # Issues the next logits before this softmax, so that their units work in
        # parallel.
        totals, ahead = [], logits(*work[0])
        for i, (h, _) in enumerate(work):
            s = ahead
            ahead = logits(*work[i + 1]) if i + 1 < len(work) else s
            top = s.max(0, keepdims=True)
            if carry is None:
                p = jnp.exp2(s - top).astype(call.dtype)
                totals.append((top, dot(vt[h], p, (1, 0))))
            else:
                before, total = carry[i]
                top = jnp.maximum(top, before)
                p = jnp.exp2(s - top).astype(call.dtype)
                total = total * jnp.exp2(before - top) + dot(vt[h], p, (1, 0))
                totals.append((top, total))
        return totals

    start = None
    if not call.whole_row:
        start = [
            (
                jnp.full((1, c.stop - c.start), _LOWEST, jnp.float32),
                jnp.zeros((width + 2 * SUBLANES, c.stop - c.start), jnp.float32),
            )
            for _, c in work
        ]
    totals = call.over_keys(bounds, visit, start)
    values, statistics = [], []
    for top, total in totals:
        weight = total[width : width + 1]
        # If no block was visited, the output is 0, not 0 / 0.
        weight = jnp.where(weight == 0, 1, weight)
        values.append(total[:width] / weight)
        statistics.append(top + jnp.log2(weight))
    n = len(chunks)
    heads = [slice(h * n, (h + 1) * n) for h in range(g)]
    out_ref, lse_ref = out
    call.store(out_ref, [jnp.concatenate(values[h], 1) for h in heads])
    for i, h in enumerate(heads):
        lse_ref[i : i + 1] = jnp.concatenate(statistics[h], 1)


def backward_kernel(
    call: Call,
    bounds: Any,
    across: Any,
    down: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    gradient: Any,
    lse: Any,
    dqkv: Any,
    ready: Any,
    sent: Any,
    dk_total: Any,
    dv_total: Any,
) -> None:
    """Writes the gradient of qkv by asynchronous copies from `ready`."""
    g, width, chunk = call.blocks.heads, call.width, call.blocks.chunk_backward
    chunks = call.cut(chunk)
    work = [(h, c) for h in range(g) for c in chunks]
    scaled = _scaled(call, q)
    product = out[...].astype(jnp.float32) * gradient[...].astype(jnp.float32)
    qt, dt, delta = [], [], []
    for h in range(g):
        qt.append(call.head_below(scaled, h))
        dt.append(call.head_below(gradient[...], h))
        delta.append(call.head_below(product, h).sum(0, keepdims=True))

    if not call.whole_row:

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            dk_total[...] = jnp.zeros_like(dk_total)
            dv_total[...] = jnp.zeros_like(dv_total)

    def visit(keys: Any, carry: Any) -> Any:
        kb, vb, key_ids = call.load(k, keys), call.load(v, keys), down[keys]
        kt = [call.head_below(kb, h) for h in range(g)]
        dks: list[Any] = [0] * g
        dvs: list[Any] = [0] * g
        dqs = []
        for i, (h, c) in enumerate(work):
            s = call.logits(call.head(kb, h), qt[h][:, c], across[:1, c], key_ids)
            p = jnp.exp2(s - lse[h : h + 1, c])
            dp = dot(call.head(vb, h), dt[h][:, c], (1, 0))
            ds = (p * (dp - delta[h][:, c])).astype(call.dtype)
            dvs[h] += dot(dt[h][:, c], p.astype(call.dtype), (1, 1))
            dks[h] += dot(qt[h][:, c], ds, (1, 1))
            x = dot(kt[h], ds, (1, 0))
            dqs.append(x if carry is None else carry[i] + x)
        if call.whole_row:
            return dqs, dks, dvs
        dk_total[:, keys] += jnp.concatenate(dks)
        dv_total[:, keys] += jnp.concatenate(dvs)
        return dqs

    # Gradients are copied out of `ready` while the next group of heads is computed.
    row, group, step = (pl.program_id(i) for i in range(3))

    def copies() -> list[Any]:
        channels = g * width
        transfers = []
        for part in range(3):
            start = part * call.h * width + group * channels
            at = pl.ds(pl.multiple_of(start, math.gcd(channels, LANES)), channels)
            to = dqkv.at[row, :, at] if call.blocks.lanes else dqkv.at[row, at]
            transfer = pltpu.make_async_copy(ready.at[part], to, sent.at[part])
            transfers.append(transfer)
        return transfers

    def wait() -> None:
        for copy in copies():
            copy.wait()

    def send(dks: list[Array], dvs: list[Array]) -> None:
        call.store(ready.at[1], [x / LOG2E for x in dks])
        call.store(ready.at[2], dvs)
        for copy in copies():
            copy.start()

    start, n = None, len(chunks)
    if call.whole_row:
        dqs, dks, dvs = call.over_keys(bounds, visit, None)
    else:
        start = [jnp.zeros((width, c.stop - c.start), jnp.float32) for _, c in work]
        dqs = call.over_keys(bounds, visit, start)
    pl.when((group > 0) & (step == 0))(wait)
    heads = [jnp.concatenate(dqs[h * n : (h + 1) * n], 1) for h in range(g)]
    queries = pl.ds(step * call.blocks.queries, call.blocks.queries)
    dq = ready.at[0, queries] if call.blocks.lanes else ready.at[0, :, queries]
    call.store(dq, [x * call.scale for x in heads])
    if call.whole_row:
        send(dks, dvs)
    else:
        rows = [slice(h * width, (h + 1) * width) for h in range(g)]

        @pl.when(step == call.steps - 1)
        def _() -> None:
            send([dk_total[x] for x in rows], [dv_total[x] for x in rows])

    pl.when((group == call.groups - 1) & (step == call.steps - 1))(wait)
