"""How each format stores our tensors: one table a format, for `codec.py`."""

from __future__ import annotations

from navit.config import ModelConfig
from navit.convert.codec import Table, Tensor

_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
_BLOCK = {  # ours: (Hugging Face, big_vision)
    "attention_norm": ("layer_norm1", "LayerNorm_0"),
    "attention.query": ("self_attn.q_proj", f"{_ATTENTION}/query"),
    "attention.key": ("self_attn.k_proj", f"{_ATTENTION}/key"),
    "attention.value": ("self_attn.v_proj", f"{_ATTENTION}/value"),
    "attention.out": ("self_attn.out_proj", f"{_ATTENTION}/out"),
    "mlp_norm": ("layer_norm2", "LayerNorm_1"),
    "mlp.up": ("mlp.fc1", f"{_MLP}/Dense_0"),
    "mlp.down": ("mlp.fc2", f"{_MLP}/Dense_1"),
}
_POOL = {
    "out": ("attention.out_proj", f"{_ATTENTION}/out"),
    "norm": ("layernorm", "LayerNorm_0"),
    "mlp.up": ("mlp.fc1", f"{_MLP}/Dense_0"),
    "mlp.down": ("mlp.fc2", f"{_MLP}/Dense_1"),
}
# The layers of an attention, in the order in which formats join them.
QKV = ("query", "key", "value")


def huggingface(model: ModelConfig) -> Table:
    """The tensors of transformers' Siglip2Model or, for a fixed grid, SiglipModel."""
    patch = "(rows columns rgb) d -> d "
    patch += "rgb rows columns" if model.vision.fixed_grid else "(rows columns rgb)"
    table = [
        Tensor("logit_scale", ("scale",), "-> 1"),
        Tensor("logit_bias", ("bias",), "-> 1"),
        Tensor("text_model.embeddings.token_embedding.weight", ("text.embedding",)),
        Tensor("text_model.embeddings.position_embedding.weight", ("text.position",)),
        *torch_layer("text.head", "text_model.head"),
        *torch_layer("text.encoder.norm", "text_model.final_layer_norm"),
        Tensor(
            "vision_model.embeddings.position_embedding.weight",
            ("vision.position.table",),
            "y x d -> (y x) d",
        ),
        Tensor(
            "vision_model.embeddings.patch_embedding.weight",
            ("vision.patch.kernel",),
            patch,
        ),
        Tensor("vision_model.embeddings.patch_embedding.bias", ("vision.patch.bias",)),
        *torch_layer("vision.encoder.norm", "vision_model.post_layernorm"),
        Tensor("vision_model.head.probe", ("vision.head.probe",), "q d -> 1 q d"),
    ]
    for tower in ("vision", "text"):
        for ours, (theirs, _) in _BLOCK.items():
            to = f"{tower}_model.encoder.layers.{{}}.{theirs}"
            table += torch_layer(f"{tower}.encoder.blocks.{ours}", to)
    for ours, (theirs, _) in _POOL.items():
        table += torch_layer(f"vision.head.{ours}", f"vision_model.head.{theirs}")
    kernels, biases = joined("vision.head")
    return [
        *table,
        Tensor("vision_model.head.attention.in_proj_weight", kernels, "i o -> o i"),
        Tensor("vision_model.head.attention.in_proj_bias", biases),
    ]


def big_vision(
    model: ModelConfig, *, scanned_vision: bool, scanned_text: bool
) -> Table:
    """The tensors of big_vision's two_towers, which are ours up to reshaping."""
    fixed = model.vision.fixed_grid
    table = [
        Tensor("params/t", ("scale",), "-> 1"),
        Tensor("params/b", ("bias",), "-> 1"),
        Tensor("params/txt/Embed_0/embedding", ("text.embedding",)),
        Tensor("params/txt/pos_embedding", ("text.position",), "t d -> 1 t d"),
        *_linen("text.head", "params/txt/head"),
        *_linen("text.encoder.norm", "params/txt/Encoder_0/encoder_norm"),
        Tensor(
            "params/img/pos_embedding",
            ("vision.position.table",),
            "y x d -> 1 (y x) d" if fixed else None,
        ),
        Tensor(
            "params/img/embedding/kernel",
            ("vision.patch.kernel",),
            "(rows columns rgb) d -> rows columns rgb d" if fixed else None,
        ),
        Tensor("params/img/embedding/bias", ("vision.patch.bias",)),
        *_linen("vision.encoder.norm", "params/img/Transformer/encoder_norm"),
        Tensor("params/img/MAPHead_0/probe", ("vision.head.probe",), "q d -> 1 q d"),
    ]
    if model.vision.embed_dim is not None:
        table += _linen("vision.projection", "params/img/head")
    for tower, encoder, scanned in (
        ("vision", "img/Transformer", scanned_vision),
        ("text", "txt/Encoder_0", scanned_text),
    ):
        block = f"params/{encoder}/encoderblock" + ("" if scanned else "_{}")
        for ours, (_, theirs) in _BLOCK.items():
            table += _linen(f"{tower}.encoder.blocks.{ours}", f"{block}/{theirs}")
    pool = {ours: theirs for ours, (_, theirs) in _POOL.items()}
    pool |= {x: f"{_ATTENTION}/{x}" for x in QKV}
    for ours, theirs in pool.items():
        table += _linen(f"vision.head.{ours}", f"params/img/MAPHead_0/{theirs}")
    return table


def joined(
    attention: str, layers: tuple[str, ...] = QKV
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kernels, and the biases, of layers that a format stores as one."""
    kernels, biases = (
        tuple(f"{attention}.{layer}.{part}" for layer in layers)
        for part in ("kernel", "bias")
    )
    return kernels, biases


def torch_patch(theirs: str, *, frames: bool = False) -> Table:
    """The patch layer, stored as PyTorch's convolution of images, or of videos."""
    time = "frames " if frames else ""
    axes = f"({time}rows columns rgb) d -> d rgb {time}rows columns"
    return [
        Tensor(f"{theirs}.weight", ("vision.patch.kernel",), axes),
        Tensor(f"{theirs}.bias", ("vision.patch.bias",)),
    ]


def torch_layer(ours: str, theirs: str) -> Table:
    """A norm or a linear layer, which torch stores as `[out, in]`."""
    first = (f"{ours}.scale",) if "norm" in ours else (f"{ours}.kernel",)
    return [
        Tensor(f"{theirs}.weight", first, None if "norm" in ours else "i o -> o i"),
        Tensor(f"{theirs}.bias", (f"{ours}.bias",)),
    ]


def _linen(ours: str, theirs: str) -> Table:
    """A norm or a linear layer; around attention, linen keeps the heads apart."""
    kernel = bias = None
    if ours.endswith(QKV):
        kernel, bias = "d (h k) -> d h k", "(h k) -> h k"
    elif ours.endswith("out"):
        kernel = "(h k) d -> h k d"
    first = "scale" if "norm" in ours else "kernel"
    return [
        Tensor(f"{theirs}/{first}", (f"{ours}.{first}",), kernel),
        Tensor(f"{theirs}/bias", (f"{ours}.bias",), bias),
    ]
