"""navit.input.text: captions into byte tokens."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.config import TextConfig
from navit.input.text import EOS, PAD, VOCAB_SIZE, encode_bytes


def decode(ids: np.ndarray) -> bytes:
    """The bytes before the end-of-text token."""
    end = ids.tolist().index(EOS)
    return bytes(i - 2 for i in ids[:end].tolist())


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=4),
    length=st.integers(1, 40),
)
def test_any_text_is_lower_case_bytes_closed_and_padded(texts, length):
    ids = encode_bytes(texts, length)
    assert ids.shape == (len(texts), length)
    assert ids.dtype == np.int32
    for row, text in zip(ids, texts, strict=True):
        full = text.lower().encode("utf-8")
        assert decode(row) == full[: length - 1]
        end = row.tolist().index(EOS)
        assert (row[end + 1 :] == PAD).all()
        assert ((row[:end] > EOS) & (row[:end] < VOCAB_SIZE)).all()


def test_case_does_not_matter():
    one, other = encode_bytes(["A Tabby CAT", "a tabby cat"], 16)
    np.testing.assert_array_equal(one, other)


def test_the_end_survives_the_cut():
    (ids,) = encode_bytes(["a" * 100], 8)
    assert ids[-1] == EOS
    assert (ids == EOS).sum() == 1


def test_an_empty_text_is_only_its_end():
    assert encode_bytes([""], 4).tolist() == [[EOS, PAD, PAD, PAD]]


def test_other_scripts_are_their_utf8_bytes():
    (ids,) = encode_bytes(["Ö猫"], 16)
    assert decode(ids) == "ö猫".encode()


def test_half_a_surrogate_pair_does_not_stop_a_run():
    # JSON can hold one ("\ud83d", a cut emoji), and scraped captions do.
    (ids,) = encode_bytes(["cat \ud83d"], 16)
    assert decode(ids).startswith(b"cat ")


def test_the_text_tower_has_an_embedding_for_every_token():
    assert TextConfig().vocab_size >= VOCAB_SIZE
