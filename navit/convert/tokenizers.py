"""The tokenizer files that lie beside weights: which, under what names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit.input.text import open_tokenizer

# What they are called in released repositories, of either format. SigLIP 1's have a
# tokenizer.json too, and transformers opens the pieces.
_NAMES = (
    *("spiece.model", "tokenizer.json", "tokenizer.model", "gemma.model"),
    *("gemma_tokenizer.model", "sentencepiece.model"),
)


def found_in(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in _NAMES if (folder / name).is_file())


def contents(files: Sequence[Path]) -> dict[str, bytes]:
    """Name -> content to write: each under the name that it is looked for by."""
    out: dict[str, bytes] = {}
    for file in files:
        name = "tokenizer.json"
        if file.suffix != ".json":
            is_siglip1 = open_tokenizer(str(file)).is_siglip1
            name = "spiece.model" if is_siglip1 else "tokenizer.model"
        out.setdefault(name, file.read_bytes())
    return out


def config(files: Sequence[Path], length: int) -> bytes:
    """tokenizer_config.json for transformers: the one beside the files, or a new one.

    Args:
      length: of the text tower.
    """
    beside = files[0].with_name("tokenizer_config.json")
    if beside.is_file():
        return beside.read_bytes()
    about: dict[str, Any] = {"model_max_length": length, "padding_side": "right"}
    if open_tokenizer(str(files[0])).is_siglip1:
        # Its class opens the pieces only; a tokenizer.json says all of itself.
        pieces = any(file.suffix != ".json" for file in files)
        name = "SiglipTokenizer" if pieces else "PreTrainedTokenizerFast"
        about |= {"tokenizer_class": name, "unk_token": "<unk>"}
        about |= {"eos_token": "</s>", "pad_token": "</s>"}
    else:
        about |= {"tokenizer_class": "Siglip2Tokenizer"}
        about |= {"add_bos_token": False, "add_eos_token": True}
        about |= {f"{x}_token": f"<{x}>" for x in ("bos", "eos", "pad", "unk")}
    return (json.dumps(about, indent=2) + "\n").encode()
