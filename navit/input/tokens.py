"""Captions -> token ids."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, EOS, _FIRST_BYTE = 0, 1, 2
VOCAB_SIZE = _FIRST_BYTE + 256


class Tokenizer(NamedTuple):
    """What `open_tokenizer` reads from a file.

    Attributes:
      split: texts -> their ids, with the text treatment of the model's training.
      size: all ids are below it.
      eos: the id that ends a text.
      pad: the id that pads after the end.
      is_siglip1: whether it is SigLIP 1's, which drops punctuation and pads with `eos`.
    """

    split: Callable[[Sequence[str]], list[Any]]
    size: int
    eos: int
    pad: int
    is_siglip1: bool = False


def encode(
    texts: Sequence[str], length: int, tokenizer: str | None = "bytes"
) -> np.ndarray:
    """Token ids, int32 `[len(texts), length]`.

    The text is treated as in SigLIP: lower-cased, without a beginning-of-text token,
    cut to `length`, closed by an end-of-text token that survives the cut, and padded
    (big_vision's `lower|tok(length=64, model="gemma", bos="no", eos="sticky")`).
    Letters of every script are lower-cased, as in transformers; big_vision's `lower`
    covers only ASCII. A special token typed in a text is text. A tokenizer that ends
    its texts with `</s>` is SigLIP 1's: punctuation is removed too, whitespace
    collapsed, and `</s>` is the padding (transformers' SiglipTokenizer).

    Args:
      tokenizer: "bytes", or the path of a SentencePiece `.model` or `tokenizer.json`;
        None if it is unknown.

    Raises:
      FileNotFoundError, ValueError: if the file does not exist, or lacks these tokens.
    """
    opened = open_tokenizer(tokenizer)
    ids = np.full((len(texts), length), opened.pad, np.int32)
    for row, tokens in zip(ids, opened.split(texts), strict=True):
        tokens = tokens[: length - 1]
        row[: len(tokens)] = tokens
        row[len(tokens)] = opened.eos
    return ids


def share_cut(
    texts: Sequence[str], length: int, tokenizer: str | None = "bytes"
) -> float:
    """Share of captions whose end `encode` cuts off."""
    opened = open_tokenizer(tokenizer)
    if not len(texts):
        return 0.0
    return float(np.mean([len(x) > length - 1 for x in opened.split(texts)]))


def check_vocabulary(tokenizer: str | None, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer has ids beyond an embedding table."""
    size = open_tokenizer(tokenizer).size
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer} has {size} ids, more than the text tower's "
            f"model.text.vocab_size={vocab_size}: name the one that the model was "
            "trained with (model.text.tokenizer), or train a model with "
            f"model.text.vocab_size={size}"
        )


@functools.lru_cache(maxsize=4)
def open_tokenizer(name: str | None) -> Tokenizer:
    """Opens a tokenizer by the name that `encode` takes; raises as `encode`."""
    if name == "bytes":
        return Tokenizer(_split_bytes, VOCAB_SIZE, EOS, PAD)
    path = Path(name or "").expanduser()
    if not name or not path.is_file():
        what = f"there is no tokenizer {name!r}" if name else "no tokenizer was found"
        raise FileNotFoundError(
            f"{what}: put the tokenizer.json or SentencePiece .model that the model "
            "was trained with beside its weights, or name it with model.text.tokenizer"
        )
    return _open_json(path) if path.suffix == ".json" else _open_pieces(path)


def _open_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        opened = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    opened.no_padding()
    opened.no_truncation()
    opened.encode_special_tokens = True  # "<eos>" in a caption does not end it

    def split(texts: list[str]) -> list[list[int]]:
        return [x.ids for x in opened.encode_batch(texts, add_special_tokens=False)]

    size = max(opened.get_vocab().values(), default=-1) + 1
    eos, pad = opened.token_to_id("<eos>"), opened.token_to_id("<pad>")
    if eos is not None and pad is not None:
        return Tokenizer(lambda texts: split(_lower_each(texts)), size, eos, pad)
    # Gemma's also has a </s>, the tag of struck-out text.
    end = opened.token_to_id("</s>")
    if eos is None and end is not None:
        return Tokenizer(lambda texts: split(_canonical(texts)), size, end, end, True)
    raise ValueError(_UNKNOWN.format(path))


def _open_pieces(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
    split, size = pieces.encode, pieces.get_piece_size()
    eos, pad = pieces.eos_id(), pieces.pad_id()
    end = pieces.id_to_piece(eos) if eos >= 0 else None
    if end == "<eos>" and pad >= 0:
        return Tokenizer(lambda texts: split(_lower_each(texts)), size, eos, pad)
    if end == "</s>":
        return Tokenizer(lambda texts: split(_canonical(texts)), size, eos, eos, True)
    raise ValueError(_UNKNOWN.format(path))


_UNKNOWN = (
    "{} has neither the <eos> and <pad> tokens of Gemma (SigLIP 2) nor the end token "
    "</s> of SigLIP 1"
)


def _lower(texts: Sequence[str]) -> list[str]:
    # Scraped captions have halves of surrogate pairs, which tokenizers refuse.
    return [text.lower().encode(errors="replace").decode() for text in texts]


def _lower_each(texts: Sequence[str]) -> list[str]:
    """Letter by letter, as in transformers' Siglip2Tokenizer: no final sigma."""
    return _lower(["".join(c.lower() for c in text) for text in texts])


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _canonical(texts: Sequence[str]) -> list[str]:
    """Lower case, no ASCII punctuation, single spaces."""
    # U+2581 is SentencePiece's own mark of a space.
    plain = (t.replace("\u2581", " ") for t in _lower(texts))
    return [" ".join(t.translate(_NO_PUNCTUATION).split()) for t in plain]


def _split_bytes(texts: Sequence[str]) -> list[np.ndarray]:
    return [
        np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _FIRST_BYTE
        for text in _lower_each(texts)
    ]
