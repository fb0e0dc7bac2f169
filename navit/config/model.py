"""The model part of a configuration (`navit/config/experiment.py`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from navit.config.overrides import positive
from navit.config.vision import VisionConfig, check_heads

# Settings of `ModelConfig` that change how a model is computed, but change its numbers
# only by rounding.
ROUNDING = (
    "model.dtype",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "model.fused",
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower: `length` token ids in, the last position projected out.

    `tokenizer`: "bytes", which needs no file, or the path of a SentencePiece `.model`
    or a `tokenizer.json`: Gemma's (SigLIP 2) or SigLIP 1's. None: unknown.
    """

    tokenizer: str | None = "bytes"
    vocab_size: int = 258
    length: int = 64
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "length", "width", "depth", "mlp_dim")
        positive(self, "num_heads")
        check_heads(self)
        if self.tokenizer == "bytes" and self.vocab_size < 258:
            raise ValueError(
                f"the byte tokenizer needs vocab_size 258, not {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True)
class MergerConfig:
    """What joins blocks of `side` x `side` patches into one vector of size `out_dim`.

    `norm`, `eps`: of each patch, before they are joined (`navit/model/merger.py`).
    `hidden_dim`: between its two layers; None is the size of the joined vector.
    """

    out_dim: int
    side: int = 2
    norm: Literal["layer", "rms", "none"] = "layer"
    eps: float = 1e-6
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        positive(self, "out_dim", "side", "eps")
        if self.hidden_dim is not None:
            positive(self, "hidden_dim")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both towers, the logit scale and bias, and how they are computed.

    `dtype="auto"` is bfloat16 on an accelerator. It is float32 on a CPU, where bfloat16
    is slower, and on a GPU older than Ampere (T4), for which jax's attention does not
    compile in it. Parameters, softmax and losses are always float32.
    `attention`: the implementations are described in navit/model/attention.py; "auto"
    chooses by platform and row length.
    `remat`: what a layer keeps for its backward pass (docs/sharding.md, "Memory").
    "auto" is "dots" on a CPU and "none" elsewhere.
    `fused` lets TPUs run the norms and products around attention as separate kernels
    if they fit (`navit/kernels/fused.py`).
    `merger`: between the image tower and the language model that it was trained with;
    training navit's losses has no use for it.
    `init_scale` is exp(t') and `init_bias` is b of the SigLIP paper's section 3.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig | None = TextConfig()
    merger: MergerConfig | None = None
    init_scale: float = 10.0
    init_bias: float = -10.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal[
        "auto", "xla", "unpack", "blocks", "splash", "splash_skip", "flash"
    ] = "auto"
    remat: Literal["auto", "none", "dots", "attention", "full"] = "auto"
    scan_unroll: int = 1
    fused: bool = True

    def __post_init__(self) -> None:
        positive(self, "init_scale", "scan_unroll")
