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
    """What `open_tokenizer` finds in a file.

    Attributes:
      split: texts -> their ids, treated as the model was trained.
      size: every id is below it.
      eos: the id that ends a text; `pad`: the one that fills up after it.
      is_siglip1: SigLIP 1's, which drops punctuation and pads with its end.
    """

    split: Callable[[Sequence[str]], list[Any]]
    size: int
    eos: int
    pad: int
    is_siglip1: bool = False


def encode(texts: Sequence[str], length: int, tokenizer: str = "bytes") -> np.ndarray:
    """Token ids, int32 `[len(texts), length]`.

    As SigLIP treats its text: lower-cased, no beginning-of-text token, cut to `length`,
    and closed by an end-of-text token that survives the cut; then padding (big_vision's
    `lower|tok(length=64, model="gemma", bos="no", eos="sticky")`). Letters of every
    script are lower-cased, as transformers does; big_vision's `lower` knows ASCII's
    only. A special token that is typed in a text is text. A tokenizer that
    ends its texts with `</s>` is SigLIP 1's: punctuation is removed too, whitespace
    collapsed, and `</s>` is the padding (transformers' SiglipTokenizer).

    Args:
      tokenizer: "bytes", or the path of a SentencePiece `.model` or `tokenizer.json`.

    Raises:
      FileNotFoundError, ValueError: if there is no such file, or no such tokens in it.
    """
    found = open_tokenizer(tokenizer)
    ids = np.full((len(texts), length), found.pad, np.int32)
    for row, tokens in zip(ids, found.split(texts), strict=True):
        tokens = tokens[: length - 1]
        row[: len(tokens)] = tokens
        row[len(tokens)] = found.eos
    return ids


def share_cut(texts: Sequence[str], length: int, tokenizer: str = "bytes") -> float:
    """Share of captions of which `encode` loses the end."""
    found = open_tokenizer(tokenizer)
    if not len(texts):
        return 0.0
    return float(np.mean([len(x) > length - 1 for x in found.split(texts)]))


def check_vocabulary(tokenizer: str, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer has ids that an embedding table has not."""
    size = open_tokenizer(tokenizer).size
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer} has {size} ids, and the text tower knows "
            f"model.text.vocab_size={vocab_size}: name the one that the model was "
            "trained with (model.text.tokenizer), or train a model with "
            f"model.text.vocab_size={size}"
        )


@functools.lru_cache(maxsize=4)
def open_tokenizer(name: str) -> Tokenizer:
    """Opens what `encode` takes by name; raises as it does."""
    if name == "bytes":
        return Tokenizer(_split_bytes, VOCAB_SIZE, EOS, PAD)
    path = Path(name).expanduser()
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
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True  # "<eos>" in a caption does not end it

    def split(texts: list[str]) -> list[list[int]]:
        return [x.ids for x in found.encode_batch(texts, add_special_tokens=False)]

    size = max(found.get_vocab().values(), default=-1) + 1
    eos, pad = found.token_to_id("<eos>"), found.token_to_id("<pad>")
    if eos is not None and pad is not None:
        return Tokenizer(lambda texts: split(_lower_each(texts)), size, eos, pad)
    # Gemma's has a </s> as well, the tag of struck-out text.
    end = found.token_to_id("</s>")
    if eos is None and end is not None:
        return Tokenizer(lambda texts: split(_canonical(texts)), size, end, end, True)
    raise ValueError(_UNKNOWN.format(path))


def _open_pieces(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from None
    split, size = pieces.encode, pieces.get_piece_size()
    eos, pad = pieces.eos_id(), pieces.pad_id()
    end = pieces.id_to_piece(eos) if eos >= 0 else None
    if end == "<eos>" and pad >= 0:
        return Tokenizer(lambda texts: split(_lower_each(texts)), size, eos, pad)
    if end == "</s>":
        return Tokenizer(lambda texts: split(_canonical(texts)), size, eos, eos, True)
    raise ValueError(_UNKNOWN.format(path))


_UNKNOWN = (
    "{} has neither <eos> and <pad> tokens, as Gemma's (SigLIP 2), nor an end token "
    "</s>, as SigLIP 1's"
)


def _lower(texts: Sequence[str]) -> list[str]:
    # Half a surrogate pair, which scraped captions have, is no text to a tokenizer.
    return [text.lower().encode(errors="replace").decode() for text in texts]


def _lower_each(texts: Sequence[str]) -> list[str]:
    """Letter by letter, as transformers' Siglip2Tokenizer: no final sigma."""
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
