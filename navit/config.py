"""The configuration of a run: frozen dataclasses.

A config is data and nothing else. `configs/*.py` each define `get_config() -> Config`;
`load` reads one and applies `key.path=value` overrides; the whole tree is saved with
the checkpoint, and evaluation rebuilds the model from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from navit import fields
from navit.datasets import AnySource as AnySource
from navit.datasets import ArrayRecords as ArrayRecords
from navit.datasets import Folder as Folder
from navit.datasets import Mixture as Mixture
from navit.datasets import ParquetImages as ParquetImages
from navit.datasets import Stream as Stream
from navit.datasets import Synthetic as Synthetic
from navit.datasets import TarShards as TarShards
from navit.datasets import Tfds as Tfds
from navit.datasets import TrainSource as TrainSource
from navit.fields import differences as differences
from navit.fields import override as override
from navit.fields import to_json as to_json


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:  # so that nan is refused too
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")


def _divisible(config: Any) -> None:
    if config.width % config.num_heads:
        raise ValueError(
            f"width {config.width} is not divisible by num_heads {config.num_heads}"
        )


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Which position embedding, and how far it reaches.

    `kind`:
      * `"siglip2"`: a learned `size` x `size` table, resized bilinearly with
        antialiasing to the image's grid, per token (SigLIP 2 section 2.4.2).
      * `"learned_1d"`: a learned vector for each of `size` raster positions (ViT).
      * `"learned_2d"`: a learned `size` x `size` table read at (row, column), without
        resizing (Pix2Struct, as NaViT section 3.2 describes it).
      * `"factorized"`: one embedding of the row and one of the column (NaViT section
        3.2), made by `coordinates`, `encoding` and `combine`.
    `coordinates`: `"absolute"` counts patches; `"fractional"` divides by the image's
    own side; `"fractional_aspect"` divides both by the longer side, so the aspect ratio
    can be told (NaViT Fig. 16).
    `encoding`: a learned table of `size` entries, fixed sinusoids, or learned Fourier
    features. `combine`: `phi_row + phi_column`, their product, or half the width each.
    """

    kind: Literal["siglip2", "learned_1d", "learned_2d", "factorized"] = "siglip2"
    size: int = 16
    coordinates: Literal["absolute", "fractional", "fractional_aspect"] = "fractional"
    encoding: Literal["learned", "sinusoidal", "fourier"] = "learned"
    combine: Literal["sum", "product", "stack"] = "sum"

    def __post_init__(self) -> None:
        _positive(self, "size")

    @property
    def has_limit(self) -> bool:
        """Whether there are grids beyond the table."""
        return self.kind.startswith("learned") or (
            self.kind == "factorized"
            and self.encoding == "learned"
            and self.coordinates == "absolute"
        )

    def check(self, grids: np.ndarray) -> None:
        """Raises ValueError if any grid `[..., 2]` reaches beyond a learned table."""
        grids = np.asarray(grids).reshape(-1, 2)
        if not self.has_limit:
            return
        if self.kind == "learned_1d":
            reach, unit = grids.prod(-1), "tokens"
        else:
            reach, unit = grids.max(-1, initial=0), "patches a side"
        if (reach > self.size).any():
            rows, columns = grids[int(reach.argmax())]
            raise ValueError(
                f"a grid of {rows}x{columns} has {reach.max()} {unit}, and the "
                f"position table ends at {self.size}: lower the token budget, raise "
                'position.size, or choose position.kind="siglip2", which has no limit'
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image tower. `embed_dim=None` means no projection after pooling.

    `fixed_grid`: every image is resized to the whole `position.size` x `position.size`
    grid, its aspect lost, as checkpoints of a fixed resolution were trained. For
    evaluation and embedding; training keeps the aspect.
    `image_size`: with `fixed_grid`, the pixels a side that images are resized to before
    the rest beyond the last whole patch is cut off (so400m-patch14-384: 384, of which
    27 x 27 patches of 14 see 378). None: as many as the patches have.
    """

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    position: PositionConfig = PositionConfig()
    qk_norm: bool = False
    use_bias: bool = True
    pool: Literal["map", "mean", "max", "none"] = "map"
    embed_dim: int | None = None
    num_classes: int = 0
    fixed_grid: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "patch_size", "width", "depth", "mlp_dim", "num_heads")
        _divisible(self)
        if self.embed_dim is not None:
            _positive(self, "embed_dim")
        if self.image_size is not None:
            if not self.fixed_grid:
                raise ValueError(
                    f"image_size={self.image_size} is for fixed_grid=true: set it to "
                    "none, or both"
                )
            if self.image_size // self.patch_size != self.position.size:
                raise ValueError(
                    f"image_size={self.image_size} has "
                    f"{self.image_size // self.patch_size} patches of patch_size="
                    f"{self.patch_size} a side, and position.size is "
                    f"{self.position.size}"
                )
        if self.pool == "none" and (self.embed_dim or self.num_classes):
            raise ValueError(
                'pool="none" returns tokens only, so it takes no embed_dim and no '
                f"num_classes (got {self.embed_dim} and {self.num_classes})"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower: `length` token ids in, the last position projected out.

    `tokenizer`: "bytes", which needs no file, or the path of a SentencePiece `.model`
    or a `tokenizer.json`: Gemma's (SigLIP 2) or SigLIP 1's. Empty: not known.
    """

    tokenizer: str = "bytes"
    vocab_size: int = 258
    length: int = 64
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "length", "width", "depth", "mlp_dim")
        _positive(self, "num_heads")
        _divisible(self)
        if self.tokenizer == "bytes" and self.vocab_size < 258:
            raise ValueError(
                f"the byte tokenizer needs vocab_size 258, not {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both towers, the logit scale and bias, and how they are computed.

    `dtype="auto"` is bfloat16 on an accelerator and float32 on a CPU, where bfloat16 is
    slower. Parameters, softmax and losses are float32 always.
    `fused` lets TPUs run the norms and products around attention as kernels of their
    own, where they fit (`navit/model/fused.py`).
    `init_scale` is exp(t') and `init_bias` is b of the SigLIP paper's section 3.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig | None = TextConfig()
    init_scale: float = 10.0
    init_bias: float = -10.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "xla", "unpack", "splash", "splash_skip"] = "auto"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    scan_unroll: int = 1
    fused: bool = True

    def __post_init__(self) -> None:
        _positive(self, "init_scale", "scan_unroll")


@dataclasses.dataclass(frozen=True)
class Sides:
    """NaViT's resolution sampling: every image gets the area of a drawn square.

    Its side in pixels (`of="side"`), or its area, is drawn between `low` and `high`:
    uniformly, or from a normal on [-1, 1], truncated there and stretched to them.
    NaViT found sides better than areas, and N(-0.5, 1) on [64, 384] best.
    """

    of: Literal["side", "area"] = "side"
    distribution: Literal["uniform", "truncated_normal"] = "truncated_normal"
    low: int = 64
    high: int = 384
    mean: float = -0.5
    std: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "low", "std")
        if self.high < self.low:
            raise ValueError(f"high={self.high} is less than low={self.low}")
        normal = NormalDist(self.mean, self.std)
        if not normal.cdf(1) - normal.cdf(-1) > 0.01:
            raise ValueError(
                f"of a normal of mean={self.mean} and std={self.std} hardly anything "
                "lies in [-1, 1], which is stretched to low and high"
            )


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random crop of every image, before its grid is found.

    `area`: range of its share of the image. `aspect`: range of its width over height,
    relative to the image's own (drawn evenly on a logarithmic scale).
    """

    area: tuple[float, ...] = (0.5, 1.0)
    aspect: tuple[float, ...] = (0.75, 4 / 3)

    def __post_init__(self) -> None:
        for name, top in (("area", 1.0), ("aspect", float("inf"))):
            found = getattr(self, name)
            if len(found) != 2 or not 0 < found[0] <= found[1] <= top:
                raise ValueError(f"{name} is a range, as (0.5, 1.0), not {found}")


@dataclasses.dataclass(frozen=True)
class TokenDrop:
    """Drops tokens of every image in training (NaViT, continuous token dropping).

    `kind`: drop the share `rate` of each image ("constant"); a share of Beta
    distribution with that mean, at most `most` ("beta"); or a share that rises with the
    image's length, from `rate - delta` to `rate + delta` ("resolution").
    With `final_rate` the rate moves from `rate` to that along a sigmoid in the number
    of images seen, half way at `midpoint` images, `timescale` images wide. NaViT found
    that dropping less in the end helps, and more hurts.
    """

    kind: Literal["constant", "beta", "resolution"] = "resolution"
    rate: float = 0.5
    final_rate: float | None = None
    midpoint: float = 0.0
    timescale: float = 1.0
    delta: float = 0.1
    most: float = 0.85

    def __post_init__(self) -> None:
        _positive(self, "timescale", "most")
        top = self.most if self.kind == "beta" else 1.0
        for name, rate in (("rate", self.rate), ("final_rate", self.last_rate)):
            if not 0 <= rate < top or top > 1:
                raise ValueError(f"{name} must be in [0, {top:g}), not {rate}")
        low, high = sorted((self.rate, self.last_rate))
        if (
            self.kind == "resolution"
            and not 0 <= low - abs(self.delta) <= (high + abs(self.delta)) < 1
        ):
            raise ValueError(
                f"delta={self.delta} takes rates of {low} to {high} out of [0, 1)"
            )
        if not math.isfinite(self.midpoint):
            raise ValueError(f"midpoint is a number of images, not {self.midpoint}")

    @property
    def last_rate(self) -> float:
        """At the end of the schedule."""
        return self.rate if self.final_rate is None else self.final_rate


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is packed.

    A global batch is `rows` rows of `row_tokens` tokens with `slots` images at most
    each (None: twice as many as a row holds on average, to a power of two; a `Stream`,
    whose sizes are not known before, needs a number).

    Every image takes one of `budgets` (in tokens), drawn anew each epoch by
    `budget_weights` (empty: evenly); `budget_per="batch"` draws one for each global
    batch, as SigLIP 2 does. `sides` draws resolutions as NaViT does, in their place.
    `max_upscale` caps how far a small image is enlarged (None: as far as the budget
    allows, SigLIP 2's own rule; 1.0: native resolution, never enlarged), but to
    `min_tokens` it always is.

    The text tower takes the captions of `caption_rows` rows at a time as one list of
    `captions` places (None: a few per cent more than such rows hold on average), so
    that it does not run on empty slots; the plan sees to it that they hold no more.
    Every device takes whole groups, so `rows` must be a multiple of devices times
    `caption_rows`; 4 to 8 is enough. None: every slot has a place.

    `crop`, `flip` and `drop` change what is seen of an image, in training alone.
    `elastic`: an image may give up this share of its tokens to close a row, which
    pads less and biases resolution downwards; off at 0.
    `workers` is the number of processes that decode; 0 decodes in threads of this
    process.
    """

    train: TrainSource = Synthetic()
    eval: AnySource | None = None
    budgets: tuple[int, ...] = (256,)
    budget_weights: tuple[float, ...] = ()
    budget_per: Literal["image", "batch"] = "image"
    sides: Sides | None = None
    min_tokens: int = 1
    max_upscale: float | None = None
    row_tokens: int = 1024
    rows: int = 8
    slots: int | None = None
    caption_rows: int | None = None
    captions: int | None = None
    open_rows: int = 16
    elastic: float = 0.0
    crop: Crop | None = None
    flip: bool = False
    drop: TokenDrop | None = None
    dct: Literal["fast", "accurate"] = "fast"
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        _positive(self, "row_tokens", "rows", "open_rows", "min_tokens")
        for name in ("max_upscale", "slots", "caption_rows", "captions"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if self.captions is not None and self.caption_rows is None:
            raise ValueError(
                f"data.captions={self.captions} are of data.caption_rows, which is not "
                "set"
            )
        if self.rows % (self.caption_rows or 1):
            raise ValueError(
                f"data.rows={self.rows} is not divisible by data.caption_rows="
                f"{self.caption_rows}"
            )
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.elastic < 1:
            raise ValueError(f"elastic is a share in [0, 1), not {self.elastic}")
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"data.budgets needs positive numbers, not {self.budgets}")
        weights = self.budget_weights
        good = all(0 < weight < math.inf for weight in weights)
        if weights and (len(weights) != len(self.budgets) or not good):
            raise ValueError(
                f"data.budget_weights={weights} needs one positive number for each of "
                f"data.budgets={self.budgets}"
            )
        if self.sides is not None and self.budget_per == "batch":
            raise ValueError('data.sides are drawn per image: budget_per="image"')
        if max(self.budgets) > self.row_tokens and self.sides is None:
            raise ValueError(
                f"data.budgets reach {max(self.budgets)} tokens, more than a row of "
                f"data.row_tokens={self.row_tokens}: lower one or raise the other"
            )
        if isinstance(self.train, Stream):
            _check_stream(self)
        if self.min_tokens > min(self.budgets) and self.sides is None:
            raise ValueError(
                f"data.min_tokens={self.min_tokens} is more than the least of "
                f"data.budgets={self.budgets}"
            )

    def most_tokens(self, patch_size: int) -> int:
        """No image takes more tokens than this."""
        if self.sides is None:
            return max(self.budgets)
        return max(1, int((self.sides.high / patch_size) ** 2))


def _check_stream(data: DataConfig) -> None:
    """Raises ValueError for what needs all sizes before the first image."""
    for name, needed in (("elastic", 0.0), ("budget_per", "image")):
        if getattr(data, name) != needed:
            raise ValueError(
                f"data.{name}={getattr(data, name)} needs a source with random access, "
                f"and a Stream has none: set it to {needed}"
            )
    if data.slots is None:
        raise ValueError("the sizes of a Stream are not known before: set data.slots")
    if data.caption_rows is not None and data.captions is None:
        raise ValueError(
            "the sizes of a Stream are not known before: set data.captions for "
            f"data.caption_rows={data.caption_rows}"
        )
    if data.eval is None:
        raise ValueError(
            "a Stream cannot be evaluated on: set data.eval to a source with random "
            "access"
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to zero (SigLIP 2 section 2.1).

    `start`: the run is the end of a longer schedule, of which this share is over: 0.9
    is where SigLIP 2's NaFlex stage resumes (section 2.4.2). `vision_lr`, `text_lr`:
    factors for the towers; 0 freezes one.
    """

    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    start: float = 0.0
    vision_lr: float = 1.0
    text_lr: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "lr", "clip_norm")
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a share in [0, 1), not {self.start}")
        for name in ("warmup_steps", "weight_decay", "vision_lr", "text_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, which loss, and how often to log and save (in steps).

    `microbatches`: towers take a device's rows in so many parts, one after another,
    and make each part's activations anew for its gradient: less memory for a third more
    work. The loss is over the whole batch all the same.
    `loss_implementation`: how the sigmoid loss meets all pairs (`navit.losses`); every
    way has the same value.
    `log_to`: where the training log goes besides metrics.jsonl and the terminal.
    `profile_steps`: "100:103" writes a trace of steps 100, 101 and 102 to
    WORKDIR/profile.
    """

    steps: int = 1000
    loss: Literal["sigmoid", "softmax", "classification"] = "sigmoid"
    microbatches: int = 1
    loss_implementation: Literal["auto", "dense", "gather", "ring"] = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    profile_steps: str = ""

    def __post_init__(self) -> None:
        _positive(self, "steps", "log_every", "checkpoint_every", "keep")
        _positive(self, "microbatches")
        if self.loss != "sigmoid" and self.loss_implementation != "auto":
            raise ValueError(
                f"train.loss_implementation={self.loss_implementation} is a way to the "
                f"sigmoid loss, and train.loss={self.loss}: leave it at auto"
            )
        window = self.profile_window
        if window and not 1 <= window[0] < window[1] <= self.steps + 1:
            raise ValueError(
                f"profile_steps={self.profile_steps} is empty or not within steps 1 to "
                f"{self.steps}: the first comes before the last, which is not traced"
            )

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The first step to trace and the one before which to stop."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(
                f'profile_steps is FIRST:LAST, as "100:103", not {self.profile_steps!r}'
            )
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Token budgets to evaluate at, images at most, and the prompts of zero-shot.

    `batch_tokens`: tokens embedded at a time; lower it where memory is short. None:
    2048 on a CPU, as its cache holds no more (4096 is a tenth slower), else 16384.
    """

    budgets: tuple[int, ...] = (256, 729, 1024)
    max_images: int | None = None
    batch_tokens: int | None = None
    prompts: tuple[str, ...] = ("{}",)

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_images"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"eval.budgets needs positive numbers, not {self.budgets}")
        if not self.prompts or any(p.count("{}") != 1 for p in self.prompts):
            raise ValueError(f'eval.prompts need one "{{}}" each, not {self.prompts}')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left.

    `fsdp` shards the parameters and their moments too, `tensor` heads and MLPs; both
    belong on the fast network of one slice. `slices` TPU slices (pods) lie along
    `data`. Where all are given, the first devices of a single host are used.
    `gradients`: the dtype in which devices sum theirs; bfloat16 halves the bytes.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1
    gradients: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _positive(self, "slices")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    `init`: weights to start from (whatever `navit.load` takes). The towers' sizes then
    come from there, where the config leaves them at their defaults.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    init: str = ""

    def __post_init__(self) -> None:
        vision, loss = self.model.vision, self.train.loss
        if loss == "classification" and not vision.num_classes:
            raise ValueError(
                'train.loss="classification" needs model.vision.num_classes'
            )
        if loss == "classification" and self.data.caption_rows is not None:
            raise ValueError(
                f"data.caption_rows={self.data.caption_rows} groups captions, and "
                f"train.loss={loss} has none: leave it at none"
            )
        if loss == "classification" and isinstance(self.data.train, Stream):
            raise ValueError("a Stream has no labels, which classification needs")
        if loss != "classification":
            if self.model.text is None:
                raise ValueError(f'train.loss="{loss}" needs a text tower, model.text')
            if vision.pool == "none":
                raise ValueError(f'train.loss="{loss}" needs model.vision.pool')
        most = self.data.most_tokens(vision.patch_size)
        if most > self.data.row_tokens:
            raise ValueError(
                f"data.sides.high={self.data.sides and self.data.sides.high} makes "
                f"images of {most} tokens, more than a row of data.row_tokens="
                f"{self.data.row_tokens}: lower one or raise the other"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the `get_config()` of a python file and applies `key.path=value`s."""
    path = Path(path)
    if not path.is_file():
        known = [*path.parent.glob("*.py"), *Path("configs").glob("*.py")]
        names = {p.stem: p for p in reversed(known)}
        near = difflib.get_close_matches(path.stem, names, 1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise FileNotFoundError(f"there is no config {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"navit_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path} defines no get_config() -> navit.config.Config")
        config = module.get_config()
    except (TypeError, SyntaxError, ImportError, NameError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() returned {config!r}, not a Config")
    return override(config, overrides)


def from_json(data: Any) -> Config:
    """The way back from `to_json`; raises as `fields.from_json`."""
    return fields.from_json(data, Config)
