"""The tokenizer files beside weights: which ones, and under which names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from navit.convert.stored import Weights
from navit.input.tokens import EOS, PAD, open_tokenizer

# Their names in released repositories of either format, the preferred first: SigLIP 1's
# have both spiece.model and tokenizer.json, and transformers opens the former.
_NAMES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "gemma.model",
    "gemma_tokenizer.model",
    "sentencepiece.model",
)


def found_in(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in _NAMES if (folder / name).is_file())


def contents(weights: Weights) -> dict[str, bytes]:
    """Name -> content of each file to write, under the names that readers expect."""
    if _is_bytes(weights):
        return {"tokenizer.json": _bytes_json()}
    out: dict[str, bytes] = {}
    for file in weights.files:
        name = "tokenizer.json"
        if file.suffix != ".json":
            is_siglip1 = open_tokenizer(str(file)).is_siglip1
            name = "spiece.model" if is_siglip1 else "tokenizer.model"
        out.setdefault(name, file.read_bytes())
    return out


def config(weights: Weights) -> bytes | None:
    """tokenizer_config.json for transformers: the one beside the files, or a new one.

    None if the tokenizer is not known.
    """
    files, text = weights.files, weights.model.text
    if text is None or not (files or _is_bytes(weights)):
        return None
    about: dict[str, Any] = {"model_max_length": text.length, "padding_side": "right"}
    if _is_bytes(weights):
        about |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        about |= {f"{x}_token": f"<{x}>" for x in ("eos", "pad")}
        return (json.dumps(about, indent=2) + "\n").encode()
    beside = files[0].with_name("tokenizer_config.json")
    if beside.is_file():
        return beside.read_bytes()
    if open_tokenizer(str(files[0])).is_siglip1:
        # SiglipTokenizer opens only the pieces; a tokenizer.json is complete by itself.
        pieces = any(file.suffix != ".json" for file in files)
        name = "SiglipTokenizer" if pieces else "PreTrainedTokenizerFast"
        about |= {"tokenizer_class": name, "unk_token": "<unk>"}
        about |= {"eos_token": "</s>", "pad_token": "</s>"}
    else:
        about |= {"tokenizer_class": "Siglip2Tokenizer"}
        about |= {"add_bos_token": False, "add_eos_token": True}
        about |= {f"{x}_token": f"<{x}>" for x in ("bos", "eos", "pad", "unk")}
    return (json.dumps(about, indent=2) + "\n").encode()


def _is_bytes(weights: Weights) -> bool:
    return weights.model.text is not None and weights.model.text.tokenizer == "bytes"


def _bytes_json() -> bytes:
    """The byte tokenizer as a tokenizer.json, with the pieces `<0x00>` to `<0xFF>`."""
    special = {"<pad>": PAD, "<eos>": EOS}
    vocab = special | {f"<0x{i:02X}>": i + len(special) for i in range(256)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    about = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": x, "special": True, **flags}
            for x, i in special.items()
        ],
        "normalizer": {"type": "Lowercase"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<eos>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
            "special_tokens": {
                "<eos>": {"id": "<eos>", "ids": [EOS], "tokens": ["<eos>"]}
            },
        },
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    return (json.dumps(about, indent=1) + "\n").encode()
