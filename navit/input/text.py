"""Captions -> token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAD, EOS, _FIRST_BYTE = 0, 1, 2
VOCAB_SIZE = _FIRST_BYTE + 256


def share_cut(texts: Sequence[str], length: int) -> float:
    """Share of captions of which `encode_bytes` loses the end."""
    lengths = [len(text.lower().encode(errors="replace")) for text in texts]
    return float(np.mean([n > length - 1 for n in lengths]))


def encode_bytes(texts: Sequence[str], length: int) -> np.ndarray:
    """Byte-level token ids, int32 `[len(texts), length]`; needs no vocabulary file.

    As SigLIP 2 treats its text: lower-cased, cut to `length`, and closed by an
    end-of-text token that survives the cut. 0 pads.
    """
    ids = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(ids, texts, strict=True):
        data = text.lower().encode(errors="replace")[: length - 1]
        row[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + _FIRST_BYTE
        row[len(data)] = EOS
    return ids
