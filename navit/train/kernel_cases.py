"""The cases of `kernel_check.py`: small arrays, a plain path, and its kernels."""

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
from navit.kernels.splash import splash, splash_skip
from navit.kernels.splash_blocks import LANES, SUBLANES, WHOLE_ROW, heads_fill_lanes
from navit.losses.contrastive import sigmoid_loss
from navit.model.attention import attention_qkvpacked
from navit.model.layers import compute_dtype
from navit.sharding import Rules, platform, split_rows
from navit.train.comparison import Case, Implementation

# The most logits of a dense mask: 1 GiB in float32.
_LOGITS = 2**28
# Images on each device, in the case of the losses.
_IMAGES = 16
KERNELS: dict[str, Callable[..., Array]] = {
    "splash": splash,
    "splash_skip": splash_skip,
}


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
    """Attention by the heads of one device; by fewer if their logits are large."""
    n, width = ids.shape[1], sizes.width // sizes.num_heads
    all_heads = sizes.num_heads // tensor
    lanes = heads_fill_lanes(all_heads, width)
    counts = [
        count
        for count in range(min(2, all_heads), all_heads + 1)
        if all_heads % count == 0 and heads_fill_lanes(count, width) == lanes
    ]
    small = [count for count in counts if count * ids.size * n <= _LOGITS]
    channels = max(small, default=counts[0]) * width
    segments = jnp.asarray(ids, jnp.int32)

    def attend(name: str, inputs: tuple[Array, ...], weights: Any) -> Array:
        del weights
        qkv = jnp.concatenate(inputs, -1)
        if name in KERNELS:
            kernel = KERNELS[name]
            return kernel(qkv, segments, width=width, interpret=_simulation())
        return attention_qkvpacked(
            qkv,
            segments,
            width=width,
            implementation=name,
            max_segments=int(ids.max()),
            max_segment_tokens=longest,
        )

    def misfit(name: str) -> str:
        if name not in KERNELS:
            return ""
        if n % LANES or channels % (2 * SUBLANES):
            return (
                f"takes multiples of {LANES} tokens and {2 * SUBLANES} channels, not "
                f"{n} and {channels}"
            )
        if name == "splash" and n > WHOLE_ROW:
            return f"takes rows of up to {WHOLE_ROW} tokens, not {n}"
        return _elsewhere()

    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((3, *ids.shape, channels), np.float32)
    q, k, v = jnp.asarray(qkv, compute_dtype(config.model.dtype))
    return Case(
        plain=functools.partial(attend, "xla"),
        implementations=[
            Implementation(
                f"{tower} attention {name}",
                functools.partial(attend, name),
                misfit(name),
                name in KERNELS and interpreted(),
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
    wide, three = sizes.mlp_dim, 3 * width
    transposed = ids.shape[1] % LANES == 0 and not heads_fill_lanes(
        sizes.num_heads, width // sizes.num_heads
    )

    def vector(size: int) -> Float[Array, " d"]:
        return jnp.asarray(0.2 * rng.standard_normal(size, np.float32))

    def matrix(inputs: int, outputs: int) -> Float[Array, "i o"]:
        values = rng.standard_normal((inputs, outputs), np.float32)
        return jnp.asarray(values * inputs**-0.5, dtype)

    def mlp(inputs: tuple[Array], weights: MlpWeights) -> Array:
        return fused_mlp(*inputs, weights, interpret=_simulation())

    def project(inputs: tuple[Array], weights: ProjectWeights) -> tuple[Array, Array]:
        options: Any = dict(transposed=transposed, interpret=_simulation())
        return norm_project(*inputs, weights, **options)

    norm = dict(scale=1 + vector(width), bias=vector(width))
    mlp_weights = MlpWeights(
        up=matrix(width, wide),
        up_bias=vector(wide),
        down=matrix(wide, width),
        down_bias=vector(width),
        **norm,
    )
    project_weights = ProjectWeights(
        kernel=matrix(width, three), kernel_bias=vector(three), **norm
    )
    x = jnp.asarray(rng.standard_normal((*ids.shape, width), np.float32), dtype)
    layers: list[tuple[str, int, Callable, Callable, Any]] = [
        ("fused_mlp", wide, mlp, _plain_mlp, mlp_weights),
        ("norm_project", three, project, _plain_project, project_weights),
    ]
    for name, hidden, run, plain, weights in layers:
        misfit = _elsewhere()
        if not config.model.fused:
            misfit = "not used with model.fused=false"
        elif rules.tensor is not None:
            misfit = f"not used with mesh.tensor={config.mesh.tensor}"
        elif name == "norm_project" and getattr(sizes, "qk_norm", False):
            misfit = f"not used with model.{tower}.qk_norm=true"
        elif not misfit and not _fits(x, hidden):
            misfit = (
                f"takes multiples of {LANES} channels and tokens, and weights that fit "
                f"a TPU's vector memory, not {width}x{hidden} channels and {ids.size} "
                "tokens"
            )
        if only_used and misfit:
            continue
        name = f"{tower} {name}"
        yield Case(
            plain=plain,
            implementations=[Implementation(name, run, misfit, interpreted())],
            inputs=(x,),
            weights=weights,
            real=segments > 0,
            altered=_one_image(segments),
            terms=max(ids.size, hidden),
        )


def _plain_norm(
    x: Float[Array, "b n d"], weights: MlpWeights | ProjectWeights
) -> Float[Array, "b n d"]:
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=EPSILON)
    return (y * weights.scale + weights.bias).astype(x.dtype)


def _plain_mlp(
    inputs: tuple[Float[Array, "b n d"]], weights: MlpWeights
) -> Float[Array, "b n d"]:
    (x,) = inputs
    y = _plain_norm(x, weights) @ weights.up + weights.up_bias
    y = jax.nn.gelu(y.astype(x.dtype), approximate=True)
    return x + (y @ weights.down + weights.down_bias).astype(x.dtype)


def _plain_project(
    inputs: tuple[Float[Array, "b n d"]], weights: ProjectWeights
) -> tuple[Float[Array, "b n c"], Float[Array, "b n d"]]:
    (x,) = inputs
    y = _plain_norm(x, weights) @ weights.kernel + weights.kernel_bias
    return y.astype(x.dtype), x


def loss_case(config: Config, rules: Rules, *, only_used: bool) -> Case | None:
    """The sigmoid loss on the mesh in use; a quarter of its slots are empty.

    None if training uses no implementation but the plain one, and only those used are
    wanted.
    """
    sigmoid = [x for x in config.train.losses if isinstance(x, Sigmoid)]
    chosen = sigmoid[0].implementation if sigmoid else None
    misfit = "" if sigmoid else "not used without the sigmoid loss"
    # A ring that fails is replaced by "gather", and "auto" may be either.
    names = ["gather"] if only_used and chosen == "gather" else ["gather", "ring"]
    if only_used and (misfit or chosen == "dense"):
        return None

    def loss(name: Any, inputs: tuple[Array, Array], weights: Any) -> Array:
        images, texts = inputs
        scale, bias = weights
        return sigmoid_loss(
            images,
            texts,
            real,
            scale=scale,
            bias=bias,
            rules=rules,
            implementation=name,
        )

    count = _IMAGES * rules.size("batch")
    embed = config.model.vision.embed_dim or config.model.vision.width
    # Every process makes its own part of the global arrays.
    rng = np.random.default_rng(jax.process_index())
    vectors = rng.standard_normal((2, count // jax.process_count(), embed), np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    empty = np.arange(vectors.shape[1]) % 4 == 3
    images, texts, real, altered = split_rows((*vectors, ~empty, empty), rules)
    return Case(
        plain=functools.partial(loss, "dense"),
        implementations=[
            Implementation(f"loss {name}", functools.partial(loss, name), misfit)
            for name in names
        ],
        inputs=(images, texts),
        weights=(np.float32(math.log(10)), np.float32(-10)),
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


def interpreted() -> bool:
    """Whether Pallas simulates a TPU, because there is none."""
    return jax.default_backend() != "tpu"


def _simulation() -> Any:
    return pltpu.InterpretParams() if interpreted() else False


def _elsewhere() -> str:
    """Why TPU kernels cannot be checked here."""
    name = platform()
    return "" if name in ("cpu", "tpu") else f"a TPU kernel, not for a {name}"
