"""The cases of `kernel_check.py`: small arrays, a plain path, and its kernels.

The plain paths of the fused layers restate `navit/model/block.py`, since the model's
layers have one compute dtype, and the check needs float32 as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from navit.config import Config, Sigmoid, TextConfig, VisionConfig
from navit.kernels.fused import EPSILON, block_tokens, fits
from navit.kernels.fused_mlp import MlpWeights, fused_mlp
from navit.kernels.norm_project import ProjectWeights, norm_project
from navit.kernels.splash_blocks import LANES, heads_fill_lanes
from navit.losses.contrastive import sigmoid_loss, uses_ring
from navit.model.attention import KERNELS, PLATFORMS, attention_qkvpacked, misfit
from navit.model.layers import compute_dtype
from navit.sharding import Rules, platform, split_rows
from navit.train.comparison import Case, Implementation

# The most logits of a dense mask: 1 GiB in float32.
_LOGITS = 2**28
# Images on each device, in the case of the losses.
_IMAGES = 16


def attention_case(
    config: Config,
    tower: str,
    sizes: VisionConfig | TextConfig,
    ids: Int[np.ndarray, "b n"],
    names: list[str],
    *,
    longest: int,
    tensor: int,
) -> Case:
    """Attention by the heads of one device; by fewer if their logits are large.

    Args:
      longest: tokens of the longest segment.
      tensor: the number of devices that heads are split over.
    """
    n, width = ids.shape[1], sizes.width // sizes.num_heads
    all_heads = sizes.num_heads // tensor
    lanes = heads_fill_lanes(all_heads, width)
    counts = [
        count
        for count in range(min(2, all_heads), all_heads + 1)
        if all_heads % count == 0 and heads_fill_lanes(count, width) == lanes
    ]
    logits = ids.size * n
    small = [count for count in counts if count * logits <= _LOGITS]
    heads, too_large = max(small, default=counts[0]), None
    if not small:
        size = heads * logits / 2**28
        too_large = f"the plain path's logits would take {size:.1f} GiB, over 1"
    segments = jnp.asarray(ids, jnp.int32)
    interpret = platform() == "cpu" and simulation()

    def attend(name: str, q: Array, k: Array, v: Array, weights: Any) -> Array:
        del weights
        qkv = jnp.concatenate([q, k, v], -1)
        if name in KERNELS:
            return KERNELS[name](qkv, segments, width=width, interpret=interpret)
        return attention_qkvpacked(
            qkv,
            segments,
            width=width,
            implementation=name,
            max_segments=int(ids.max()),
            max_segment_tokens=longest,
        )

    rng, channels = np.random.default_rng(0), heads * width
    qkv = rng.standard_normal((3, *ids.shape, channels), np.float32)
    q, k, v = jnp.asarray(qkv, compute_dtype(config.model.dtype))
    return Case(
        plain=functools.partial(attend, "xla"),
        implementations=[
            Implementation(
                f"{tower} attention {name}",
                functools.partial(attend, name),
                too_large
                or misfit(name, n, channels, _kernel_platform(PLATFORMS.get(name))),
                name in KERNELS and bool(interpret),
            )
            for name in names
        ],
        inputs=(q, k, v),
        weights=(),
        real=segments > 0,
        altered=_one_image(segments),
        terms=max(n, channels),
    )


def fused_cases(
    config: Config,
    rules: Rules,
    tower: str,
    sizes: VisionConfig | TextConfig,
    ids: Int[np.ndarray, "b n"],
    *,
    only_used: bool,
) -> Iterator[Case]:
    """The fused layers of a tower, on tokens of a block's input."""
    rng, segments = np.random.default_rng(0), jnp.asarray(ids, jnp.int32)
    dtype, width = compute_dtype(config.model.dtype), sizes.width
    transposed = ids.shape[1] % LANES == 0 and not heads_fill_lanes(
        sizes.num_heads, width // sizes.num_heads
    )

    def vector(size: int) -> Float[Array, " d"]:
        return jnp.asarray(0.2 * rng.standard_normal(size, np.float32))

    def matrix(inputs: int, outputs: int) -> Float[Array, "i o"]:
        values = rng.standard_normal((inputs, outputs), np.float32)
        return jnp.asarray(values * inputs**-0.5, dtype)

    norm = dict(scale=1 + vector(width), bias=vector(width))
    x = jnp.asarray(rng.standard_normal((*ids.shape, width), np.float32), dtype)
    eps = getattr(sizes, "eps", EPSILON)
    simulated: Any = dict(interpret=simulation(), eps=eps)
    mlp = functools.partial(fused_mlp, **simulated)
    project = functools.partial(norm_project, transposed=transposed, **simulated)
    plain_mlp, plain_project = (
        functools.partial(plain, eps=eps) for plain in (_plain_mlp, _plain_project)
    )
    hidden, joined = sizes.mlp_dim, 3 * width
    mlp_weights = MlpWeights(
        up=matrix(width, hidden),
        up_bias=vector(hidden),
        down=matrix(hidden, width),
        down_bias=vector(width),
        **norm,
    )
    project_weights = ProjectWeights(
        kernel=matrix(width, joined), kernel_bias=vector(joined), **norm
    )
    layers: list[tuple[str, int, Callable, Callable, Any]] = [
        ("fused_mlp", hidden, mlp, plain_mlp, mlp_weights),
        ("norm_project", joined, project, plain_project, project_weights),
    ]
    for name, channels, run, plain, weights in layers:
        why = None
        if not config.model.fused:
            why = "not used with model.fused=false"
        elif rules.tensor is not None:
            why = f"not used with mesh.tensor={config.mesh.tensor}"
        elif other := _uncovered(name, sizes):
            why = f"not used with model.{tower}.{other}"
        elif _kernel_platform() != "tpu":
            why = f"is a TPU kernel, and this runs on a {platform()}"
        elif not _fits(x, channels):
            why = (
                f"takes multiples of {LANES} channels and tokens, and weights that fit "
                f"a TPU's vector memory, not {width}x{channels} channels and "
                f"{ids.size} tokens"
            )
        if only_used and why:
            continue
        yield Case(
            plain=plain,
            implementations=[
                Implementation(f"{tower} {name}", run, why, bool(simulation()))
            ],
            inputs=(x,),
            weights=weights,
            real=segments > 0,
            altered=_one_image(segments),
            terms=max(ids.size, channels),
        )


# The settings that each fused kernel takes only at their defaults.
_COVERED = {
    "fused_mlp": ("norm", "act", "gated", "layer_scale"),
    "norm_project": ("norm", "qk_norm"),
}


def _uncovered(kernel: str, sizes: VisionConfig | TextConfig) -> str | None:
    """A setting, as `name=value`, with which the tower does not use this kernel."""
    for name in _COVERED[kernel]:
        usual = getattr(VisionConfig, name)
        value = getattr(sizes, name, usual)
        if value != usual:
            return f"{name}={str(value).lower()}"
    return None


def _plain_norm(
    x: Float[Array, "b n d"], weights: MlpWeights | ProjectWeights, eps: float
) -> Float[Array, "b n d"]:
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps)
    return (y * weights.scale + weights.bias).astype(x.dtype)


def _plain_mlp(
    x: Float[Array, "b n d"], weights: MlpWeights, eps: float
) -> Float[Array, "b n d"]:
    y = _plain_norm(x, weights, eps) @ weights.up + weights.up_bias
    y = jax.nn.gelu(y.astype(x.dtype), approximate=True)
    return x + (y @ weights.down + weights.down_bias).astype(x.dtype)


def _plain_project(
    x: Float[Array, "b n d"], weights: ProjectWeights, eps: float
) -> tuple[Float[Array, "b n c"], Float[Array, "b n d"]]:
    y = _plain_norm(x, weights, eps) @ weights.kernel + weights.kernel_bias
    return y.astype(x.dtype), x


def loss_case(config: Config, rules: Rules, *, only_used: bool) -> Case | None:
    """The sigmoid loss on the mesh in use; a quarter of its slots are empty.

    None if training uses no implementation but the plain one, and only those used are
    wanted.
    """
    sigmoid = next((x for x in config.train.losses if isinstance(x, Sigmoid)), None)
    embed = config.model.vision.embed_dim or config.model.vision.width
    unused = None if sigmoid else "not used without the sigmoid loss"
    ring = None if rules.size("batch") > 1 else "needs several devices"
    names = ["gather", "ring"]
    if only_used:
        if sigmoid is None or sigmoid.implementation == "dense":
            return None
        # Rows have at most one slot for each token.
        count = config.data.rows * (config.data.slots or config.data.row_tokens)
        texts = jax.ShapeDtypeStruct((count, embed), jnp.float32)
        if ring or not uses_ring(texts, sigmoid.implementation):
            names = ["gather"]  # otherwise both: "gather" replaces a ring that fails

    def loss(name: Any, images: Array, texts: Array, weights: Any) -> Array:
        options: Any = dict(rules=rules, implementation=name, **weights)
        return sigmoid_loss(images, texts, real, **options)

    count = _IMAGES * rules.size("batch")
    # Every process makes its own part of the global arrays.
    rng = np.random.default_rng(jax.process_index())
    vectors = rng.standard_normal((2, count // jax.process_count(), embed), np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    empty = np.arange(vectors.shape[1]) % 4 == 3
    images, texts, real, altered = split_rows((*vectors, ~empty, empty), rules)
    return Case(
        plain=functools.partial(loss, "dense"),
        implementations=[
            Implementation(
                f"loss {name}",
                functools.partial(loss, name),
                unused or (ring if name == "ring" else None),
            )
            for name in names
        ],
        inputs=(images, texts),
        weights=dict(scale=np.float32(math.log(10)), bias=np.float32(-10)),
        real=real,
        altered=altered,
        terms=count**2,
    )


def _one_image(segments: Int[Array, "b n"]) -> Bool[Array, "b n"]:
    return (segments == 1) & (jnp.arange(len(segments)) == 0)[:, None]


def _fits(x: Float[Array, "b n d"], hidden: int) -> bool:
    if platform() == "tpu":
        return fits(x, hidden, ())
    return x.shape[-1] % LANES == 0 and block_tokens(x, hidden, ()) > 0


def simulation() -> Any:
    """How Pallas simulates a TPU where there is none; False on a TPU."""
    return jax.default_backend() != "tpu" and pltpu.InterpretParams()


def _kernel_platform(own: str | None = "tpu") -> str:
    """Where kernels of the platform `own` run: a CPU interprets them."""
    return own if own and platform() == "cpu" else platform()
