"""Captions -> token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAD, EOS, _FIRST_BYTE = 0, 1, 2
VOCAB_SIZE = _FIRST_BYTE + 256


def encode(texts: Sequence[str], length: int, tokenizer: str = "bytes") -> np.ndarray:
    """Token ids, int32 `[len(texts), length]`.

    As SigLIP 2 treats its text: lower-cased, no beginning-of-text token, cut to
    `length`, and closed by an end-of-text token that survives the cut; then padding
    (big_vision's `lower|tok(length=64, model="gemma", bos="no", eos="sticky")`).

    Args:
      tokenizer: "bytes", or the path of a SentencePiece `.model` or `tokenizer.json`.

    Raises:
      FileNotFoundError, ValueError: if there is no such file, or no such tokens in it.
    """
    split, eos, pad = _tokenizer(tokenizer)
    ids = np.full((len(texts), length), pad, np.int32)
    for row, found in zip(ids, split([t.lower() for t in texts]), strict=True):
        found = found[: length - 1]
        row[: len(found)] = found
        row[len(found)] = eos
    return ids


def share_cut(texts: Sequence[str], length: int, tokenizer: str = "bytes") -> float:
    """Share of captions of which `encode` loses the end."""
    split, _, _ = _tokenizer(tokenizer)
    if not len(texts):
        return 0.0
    return float(
        np.mean([len(x) > length - 1 for x in split([t.lower() for t in texts])])
    )


# Texts, lower-cased -> their ids; the id that ends a text, the id that pads.
_Tokenizer = tuple[Callable[[list[str]], list[Any]], int, int]


@functools.lru_cache(maxsize=4)
def _tokenizer(name: str) -> _Tokenizer:
    if name == "bytes":
        return _split_bytes, EOS, PAD
    path = Path(name).expanduser()
    if not name or not path.is_file():
        what = f"there is no tokenizer {name!r}" if name else "no tokenizer was found"
        raise FileNotFoundError(
            f"{what}: put the tokenizer.json or SentencePiece .model that the model "
            "was trained with beside its weights, or name it with model.text.tokenizer"
        )
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        try:
            found = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer.json: {error}") from None
        found.no_padding()
        found.no_truncation()
        eos, pad = found.token_to_id("<eos>"), found.token_to_id("<pad>")
        if eos is None or pad is None:
            raise ValueError(
                f"{path} has no <eos> or no <pad> token, as Gemma's has; SigLIP 1's "
                "tokenizer, which treats text otherwise, is not supported"
            )

        def split(texts: list[str]) -> list[list[int]]:
            return [x.ids for x in found.encode_batch(texts, add_special_tokens=False)]

        return split, eos, pad
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from None
    eos = pieces.eos_id()
    if pieces.pad_id() < 0 or eos < 0 or pieces.id_to_piece(eos) != "<eos>":
        raise ValueError(
            f"{path} has no <eos> or no <pad> token, as Gemma's has; SigLIP 1's "
            "tokenizer, which treats text otherwise, is not supported"
        )
    return pieces.encode, pieces.eos_id(), pieces.pad_id()


def _split_bytes(texts: list[str]) -> list[np.ndarray]:
    return [
        np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)
        + _FIRST_BYTE
        for text in texts
    ]
