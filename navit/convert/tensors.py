"""Maps our tensors to those of the two formats."""

from __future__ import annotations

from navit.config import ModelConfig
from navit.convert.stored import Tensor

_BLOCK = {  # ours: (Hugging Face, big_vision)
    "attention_norm": ("layer_norm1", "LayerNorm_0"),
    "attention.query": ("self_attn.q_proj", "MultiHeadDotProductAttention_0/query"),
    "attention.key": ("self_attn.k_proj", "MultiHeadDotProductAttention_0/key"),
    "attention.value": ("self_attn.v_proj", "MultiHeadDotProductAttention_0/value"),
    "attention.out": ("self_attn.out_proj", "MultiHeadDotProductAttention_0/out"),
    "mlp_norm": ("layer_norm2", "LayerNorm_1"),
    "mlp.up": ("mlp.fc1", "MlpBlock_0/Dense_0"),
    "mlp.down": ("mlp.fc2", "MlpBlock_0/Dense_1"),
}
_POOL = {
    "out": ("attention.out_proj", "MultiHeadDotProductAttention_0/out"),
    "norm": ("layernorm", "LayerNorm_0"),
    "mlp.up": ("mlp.fc1", "MlpBlock_0/Dense_0"),
    "mlp.down": ("mlp.fc2", "MlpBlock_0/Dense_1"),
}


def huggingface(*, conv: bool) -> list[Tensor]:
    """The tensors of transformers' Siglip2Model or, with `conv`, its SiglipModel."""
    table = [
        Tensor("scale", "logit_scale"),
        Tensor("bias", "logit_bias"),
        Tensor("text.embedding", "text_model.embeddings.token_embedding.weight"),
        Tensor("text.position", "text_model.embeddings.position_embedding.weight"),
        *_linear("text.head", "text_model.head"),
        *_norm("text.encoder.norm", "text_model.final_layer_norm"),
        Tensor(
            "vision.position.table", "vision_model.embeddings.position_embedding.weight"
        ),
        Tensor(
            "vision.patch.kernel",
            "vision_model.embeddings.patch_embedding.weight",
            "conv" if conv else "transpose",
        ),
        Tensor("vision.patch.bias", "vision_model.embeddings.patch_embedding.bias"),
        *_norm("vision.encoder.norm", "vision_model.post_layernorm"),
        Tensor("vision.head.probe", "vision_model.head.probe"),
    ]
    for tower in ("vision", "text"):
        for ours, (theirs, _) in _BLOCK.items():
            to = f"{tower}_model.encoder.layers.{{}}.{theirs}"
            make = _norm if "norm" in ours else _linear
            table += make(f"{tower}.encoder.blocks.{ours}", to)
    for ours, (theirs, _) in _POOL.items():
        make = _norm if "norm" in ours else _linear
        table += make(f"vision.head.{ours}", f"vision_model.head.{theirs}")
    for i, ours in enumerate(("query", "key", "value")):
        to = "vision_model.head.attention.in_proj_"
        table += [
            Tensor(f"vision.head.{ours}.kernel", to + "weight", "transpose", (i, 3)),
            Tensor(f"vision.head.{ours}.bias", to + "bias", "same", (i, 3)),
        ]
    return table


def big_vision(
    model: ModelConfig, *, scanned_vision: bool, scanned_text: bool
) -> list[Tensor]:
    """The tensors of big_vision's two_towers, which are ours up to reshaping."""
    table = [
        Tensor("scale", "params/t"),
        Tensor("bias", "params/b"),
        Tensor("text.embedding", "params/txt/Embed_0/embedding"),
        Tensor("text.position", "params/txt/pos_embedding"),
        *_both("text.head", "params/txt/head", "kernel"),
        *_both("text.encoder.norm", "params/txt/Encoder_0/encoder_norm", "scale"),
        Tensor("vision.position.table", "params/img/pos_embedding"),
        *_both("vision.patch", "params/img/embedding", "kernel"),
        *_both("vision.encoder.norm", "params/img/Transformer/encoder_norm", "scale"),
        Tensor("vision.head.probe", "params/img/MAPHead_0/probe"),
    ]
    if model.vision.embed_dim is not None:
        table += _both("vision.projection", "params/img/head", "kernel")
    for tower, encoder, scanned in (
        ("vision", "img/Transformer", scanned_vision),
        ("text", "txt/Encoder_0", scanned_text),
    ):
        for ours, (_, theirs) in _BLOCK.items():
            block = "encoderblock" if scanned else "encoderblock_{}"
            table += _both(
                f"{tower}.encoder.blocks.{ours}",
                f"params/{encoder}/{block}/{theirs}",
                "scale" if "norm" in ours else "kernel",
            )
    pool = {k: v[1] for k, v in _POOL.items()}
    for ours in ("query", "key", "value"):
        pool[ours] = f"MultiHeadDotProductAttention_0/{ours}"
    for ours, theirs in pool.items():
        table += _both(
            f"vision.head.{ours}",
            f"params/img/MAPHead_0/{theirs}",
            "scale" if "norm" in ours else "kernel",
        )
    return table


def _linear(ours: str, theirs: str) -> list[Tensor]:
    return [
        Tensor(f"{ours}.kernel", f"{theirs}.weight", "transpose"),
        Tensor(f"{ours}.bias", f"{theirs}.bias"),
    ]


def _norm(ours: str, theirs: str) -> list[Tensor]:
    return [
        Tensor(f"{ours}.scale", f"{theirs}.weight"),
        Tensor(f"{ours}.bias", f"{theirs}.bias"),
    ]


def _both(ours: str, theirs: str, first: str) -> list[Tensor]:
    return [Tensor(f"{ours}.{x}", f"{theirs}/{x}") for x in (first, "bias")]
