"""navit.input.tokens: captions into token ids."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.config import TextConfig
from navit.input.tokens import EOS, PAD, VOCAB_SIZE, encode, share_cut

GOLDEN = Path(__file__).parents[1] / "golden"


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
    ids = encode(texts, length)
    assert ids.shape == (len(texts), length)
    assert ids.dtype == np.int32
    for row, text in zip(ids, texts, strict=True):
        full = "".join(c.lower() for c in text).encode("utf-8")
        assert decode(row) == full[: length - 1]
        end = row.tolist().index(EOS)
        assert (row[end + 1 :] == PAD).all()
        assert ((row[:end] > EOS) & (row[:end] < VOCAB_SIZE)).all()


def test_case_does_not_matter():
    one, other = encode(["A Tabby CAT", "a tabby cat"], 16)
    np.testing.assert_array_equal(one, other)


def test_the_end_survives_the_cut():
    (ids,) = encode(["a" * 100], 8)
    assert ids[-1] == EOS
    assert (ids == EOS).sum() == 1


def test_an_empty_text_is_only_its_end():
    assert encode([""], 4).tolist() == [[EOS, PAD, PAD, PAD]]


def test_other_scripts_are_their_utf8_bytes():
    (ids,) = encode(["Ö猫"], 16)
    assert decode(ids) == "ö猫".encode()


@pytest.fixture
def greek(tmp_path) -> str:
    """A tokenizer.json of single letters, with both of the small sigmas."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *"<>eosdöоς\u0307iaσδο"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def spelled(text: str, file: str) -> list[str]:
    made = tokenizers.Tokenizer.from_file(file)
    (ids,) = encode([text], 12, file).tolist()
    return [made.id_to_token(i) for i in ids[: ids.index(1)]]


@pytest.mark.parametrize("text", ["ΟΔΟΣ", "ÖΣ", "İ", "οδος"])
def test_letters_are_lowered_one_by_one(text, greek):
    """As in tokenizers' Lowercase, transformers' Siglip2Tokenizer: no final sigma."""
    lowered = tokenizers.normalizers.Lowercase().normalize_str(text)
    assert spelled(text, greek) == list(lowered)
    assert ("ς" in lowered) == ("ς" in text)


def test_a_special_token_in_a_caption_is_text(greek, pieces):
    """In either kind of file, it does not end the caption."""
    assert spelled("a<eos>a", greek) == list("a<eos>a")
    (ids,) = encode(["a <eos> cat"], 32, str(pieces)).tolist()
    assert ids.index(1) > 4 and set(ids[ids.index(1) + 1 :]) == {0}


FILES = ["siglip2_a/tokenizer.json", "siglip_fixed/tokenizer.json"]
FILES += ["siglip_fixed/spiece.model"]


@pytest.mark.parametrize("name", ["bytes", *(str(GOLDEN / x) for x in FILES)])
def test_half_a_surrogate_pair_does_not_stop_a_run(name):
    # JSON can contain one ("\ud83d", a cut emoji), and scraped captions do.
    np.testing.assert_array_equal(
        encode(["cat \ud83d"], 16, name), encode(["cat ?"], 16, name)
    )


def test_the_text_tower_has_an_embedding_for_every_token():
    assert TextConfig().vocab_size >= VOCAB_SIZE


@pytest.mark.parametrize(
    "file",
    ["siglip2_a/tokenizer.json", "siglip2_b/tokenizer.json", "gemma/gemma.model"],
)
def test_gemmas_tokenizer_gives_the_ids_of_transformers(file):
    """Upper case, an empty text, one too long, accents, unknown characters."""
    file = GOLDEN / file
    with np.load(file.with_name("tokens.npz")) as found:
        texts, ids = found["texts"].tolist(), found["ids"]
    got = encode(texts, ids.shape[1], str(file))
    np.testing.assert_array_equal(got, ids)
    assert (ids == 1).sum(1).tolist() == [1] * len(texts)  # each ends


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_siglip_1_gives_the_ids_of_transformers(file):
    """Upper case, punctuation, spaces of all kinds, nothing, too much, unknown."""
    with np.load(GOLDEN / "siglip_fixed/tokens.npz") as found:
        texts, want = found["texts"].tolist(), found["ids"]
    name, length = str(GOLDEN / "siglip_fixed" / file), want.shape[1]
    np.testing.assert_array_equal(encode(texts, length, name), want)
    assert (want[:, -1] == 1).all()  # the end token closes and pads
    assert (want[[texts.index(""), texts.index("?!")]] == 1).all()
    np.testing.assert_array_equal(
        encode(["  It's A \t cat... "], 20, name), encode(["its a cat"], 20, name)
    )
    assert share_cut(["cat"], length, name) == 0 < share_cut(texts, length, name)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A SentencePiece model with Gemma's numbers: 0 pads, 1 ends, 2 begins."""
    prefix = tmp_path_factory.mktemp("pieces") / "gemma"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "two dogs in the rain"] * 20),
        model_prefix=str(prefix),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>"),
    )
    return prefix.with_suffix(".model")


def test_sentencepiece_ids_are_its_own_then_the_end(pieces):
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    texts = ["A Photo of two DOGS", "", "cat " * 30]
    got = encode(texts, 12, str(pieces))
    for row, text in zip(got, texts, strict=True):
        ids = own.encode(text.lower())[:11]
        assert row.tolist() == [*ids, 1, *[0] * (11 - len(ids))]
    assert share_cut(texts, 12, str(pieces)) == pytest.approx(2 / 3)
    np.testing.assert_array_equal(
        got, encode([t.lower() for t in texts], 12, str(pieces))
    )


def test_a_file_that_is_not_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer 'gemma'"):
        encode(["a"], 4, "gemma")
    for name in ("tokenizer.json", "x.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"{name} is not a"):
            encode(["a"], 4, str(tmp_path / name))
