"""Makes the golden files: transformers' own SigLIP classes with random weights.

  pip install torch transformers safetensors && python tests/golden/make.py

Every parameter is random, norms and biases too, so that one left unused shows. Each
folder holds what `from_pretrained` opens, and `expected.npz`: inputs and outputs.
"""

import json
import pathlib
import re
import shutil
import string

import numpy as np
import sentencepiece
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)

HERE = pathlib.Path(__file__).parent
GRIDS = [(1, 40), (23, 7), (16, 16), (9, 31), (3, 85), (40, 2), (1, 1), (5, 1)]

NAFLEX = {
    "siglip2_a": (
        dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2)
        | dict(num_attention_heads=4, patch_size=4, num_patches=256),
        dict(hidden_size=40, intermediate_size=64, num_hidden_layers=3)
        | dict(num_attention_heads=2, vocab_size=97, max_position_embeddings=12),
    ),
    "siglip2_b": (  # odd sizes: 3 heads of 10, an odd MLP, a table of 7, patch 3
        dict(hidden_size=30, intermediate_size=53, num_hidden_layers=3)
        | dict(num_attention_heads=3, patch_size=3, num_patches=49),
        dict(hidden_size=21, intermediate_size=37, num_hidden_layers=1)
        | dict(num_attention_heads=3, vocab_size=61, max_position_embeddings=9),
    ),
}
FIXED = {
    "siglip_fixed": (
        dict(hidden_size=36, intermediate_size=50, num_hidden_layers=2)
        | dict(num_attention_heads=3, patch_size=4, image_size=20),
        dict(hidden_size=24, intermediate_size=30, num_hidden_layers=2)
        | dict(num_attention_heads=2, vocab_size=50, max_position_embeddings=8),
    ),
    "siglip_cut": (  # the convolution leaves 3 pixels of 23 out
        dict(hidden_size=27, intermediate_size=35, num_hidden_layers=1)
        | dict(num_attention_heads=3, patch_size=5, image_size=23),
        dict(hidden_size=15, intermediate_size=21, num_hidden_layers=1)
        | dict(num_attention_heads=3, vocab_size=41, max_position_embeddings=7),
    ),
}


def randomize(model, rng):
    for name, p in model.named_parameters():
        scale = 0.2 if p.ndim > 1 else 0.3
        noise = torch.from_numpy(rng.normal(size=tuple(p.shape)).astype(np.float32))
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = one + scale * noise
    model.logit_scale.data[:] = 1.3
    model.logit_bias.data[:] = -4.2
    return model.eval()


def right_positions(model, grid):
    """The position table resized by the definition, in float64, for one grid.

    torch's own antialiased resize leaves the height as it is where the output is one
    column wide (CPU), so those rows are not taken from it.
    """
    table = model.vision_model.embeddings.position_embedding.weight.double()
    side = round(len(table) ** 0.5)

    def weights(size):
        scale = max(side / size, 1.0)
        centre = (np.arange(size) + 0.5) * side / size
        distance = np.abs(np.arange(side)[None] + 0.5 - centre[:, None]) / scale
        w = np.maximum(1 - distance, 0)
        return torch.from_numpy(w / w.sum(1, keepdims=True))

    y, x = weights(grid[0]), weights(grid[1])
    out = torch.einsum("iy,jx,yxd->ijd", y, x, table.reshape(side, side, -1))
    return out.reshape(-1, table.shape[-1]).float()


def naflex(name, vision, text, rng):
    text = text | dict(projection_size=vision["hidden_size"])
    text |= dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    config = Siglip2Config(vision_config=vision, text_config=text)
    model = randomize(Siglip2Model(config), rng)
    save(model, name)
    out = {}
    ids = rng.integers(0, text["vocab_size"], (5, text["max_position_embeddings"]))
    out["ids"] = ids.astype(np.int32)
    embeddings = model.vision_model.embeddings
    out["grids"] = np.array(GRIDS, np.int32)
    with torch.no_grad():
        t = model.text_model(input_ids=torch.from_numpy(ids)).pooler_output
        out["text"] = t.numpy()
        for i, grid in enumerate(GRIDS):
            n = grid[0] * grid[1]
            patches = rng.uniform(-1, 1, (n, vision["patch_size"] ** 2 * 3))
            patches = patches.astype(np.float32)
            inputs = dict(
                pixel_values=torch.from_numpy(patches[None]),
                pixel_attention_mask=torch.ones(1, n, dtype=torch.int32),
                spatial_shapes=torch.tensor([grid]),
            )
            if grid[1] == 1 and grid[0] > 1:
                right = right_positions(model, grid)[None]
                embeddings.resize_positional_embeddings = lambda *a, r=right, **k: r
            found = model.vision_model(**inputs)
            embeddings.__dict__.pop("resize_positional_embeddings", None)
            if grid[1] > 1:  # so the definition above is what torch does elsewhere
                table = embeddings.position_embedding.weight
                side = round(len(table) ** 0.5)
                theirs = embeddings.resize_positional_embeddings(
                    table.reshape(side, side, -1), torch.tensor([grid]), max_length=n
                )[0]
                assert (theirs - right_positions(model, grid)).abs().max() < 1e-5
            out[f"patches_{i}"] = patches
            out[f"tokens_{i}"] = found.last_hidden_state[0].numpy()
            out[f"pooled_{i}"] = found.pooler_output[0].numpy()
        z = torch.tensor(np.stack([out[f"pooled_{i}"] for i in range(len(GRIDS))]))
        z, t = (x / x.norm(dim=-1, keepdim=True) for x in (z, t))
        out["logits"] = (z @ t.T * model.logit_scale.exp() + model.logit_bias).numpy()
    np.savez_compressed(HERE / name / "expected.npz", **out)


def fixed(name, vision, text, rng):
    text = text | dict(projection_size=vision["hidden_size"])
    text |= dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    config = SiglipConfig(vision_config=vision, text_config=text)
    model = randomize(SiglipModel(config), rng)
    save(model, name)
    ids = rng.integers(0, text["vocab_size"], (5, text["max_position_embeddings"]))
    side = vision["image_size"]
    pixels = rng.integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    values = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        v = model.vision_model(pixel_values=values)
        t = model.text_model(input_ids=torch.from_numpy(ids)).pooler_output
        logits = model(
            input_ids=torch.from_numpy(ids), pixel_values=values
        ).logits_per_image
    np.savez_compressed(
        HERE / name / "expected.npz",
        ids=ids.astype(np.int32),
        pixels=pixels,
        tokens=v.last_hidden_state.numpy(),
        pooled=v.pooler_output.numpy(),
        text=t.numpy(),
        logits=logits.numpy(),
    )


TEXTS = [
    "a photo of a CAT",
    "",
    "Zwei Hunde, im Regen?",
    "cat " * 40,
    "ÄÖ cafe\u0301 猫",
]


def tokenizer(name, length, vocab_size):
    """A small tokenizer.json like Gemma's, and the ids that transformers gives."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special)
    made.train_from_iterator([t.lower() for t in TEXTS[:3]] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made.save(str(HERE / name / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / name / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="right",
    )
    found = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
    np.savez_compressed(
        HERE / name / "tokens.npz", texts=TEXTS, ids=np.array(found["input_ids"])
    )


TEXTS_1 = [
    "A photo of a CAT.",
    "",
    "  Zwei  Hunde,\tim Regen? ",
    "it's 'cold', isn't it\u2026 (no-one knows)",
    "cat " * 40,
    "?!",
    "\u2581two\u2581dogs <pad>",
    "\u00c4\u00d6 cafe\u0301 \u732b",
]


def pieces(name, length, vocab_size):
    """A small spiece.model like SigLIP 1's, and the ids that transformers gives."""
    # Of the default normalization, 240 kB, the rules for spaces and an ellipsis.
    rules = HERE / name / "rules.tsv"
    rules.write_text("2581\t20\nA0\t20\n9\t20\n2026\t2E 2E 2E\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "it is cold", "zwei hunde"] * 20),
        model_prefix=str(HERE / name / "spiece"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_tsv=str(rules),
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    )
    rules.unlink()
    (HERE / name / "spiece.vocab").unlink()
    file = str(HERE / name / "spiece.model")
    theirs = SiglipTokenizer(file)
    options = dict(padding="max_length", truncation=True, max_length=length)
    ids = np.array(theirs(TEXTS_1, **options)["input_ids"])
    np.savez_compressed(HERE / name / "tokens.npz", texts=TEXTS_1, ids=ids)
    as_json(sentencepiece.SentencePieceProcessor(model_file=file), name)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / name / "tokenizer.json"), pad_token="</s>"
    )
    assert np.array_equal(fast(TEXTS_1, **options)["input_ids"], ids)


def gemma():
    """A small gemma.model, and the ids that transformers gives."""
    shutil.rmtree(HERE / "gemma", ignore_errors=True)
    (HERE / "gemma").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "it is cold", "zwei hunde"] * 20),
        model_prefix=str(HERE / "gemma/gemma"),
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        **dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3),
        **dict(eos_piece="<eos>", bos_piece="<bos>"),
    )
    (HERE / "gemma/gemma.vocab").unlink()
    theirs = Siglip2Tokenizer.from_pretrained(
        HERE / "gemma",
        vocab_file=str(HERE / "gemma/gemma.model"),
        padding_side="right",
        add_bos_token=False,  # as released
        add_eos_token=True,
    )
    found = theirs(TEXTS, padding="max_length", truncation=True, max_length=9)
    ids = np.array(found["input_ids"])
    np.savez_compressed(HERE / "gemma/tokens.npz", texts=TEXTS, ids=ids)


def as_json(pieces, name):
    """The same pieces as a tokenizer.json, as the released repositories have both."""
    found = range(pieces.get_piece_size())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in found]
    made = Tokenizer(models.Unigram(vocab, unk_id=2))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("\u2581", " "),
            normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Replace("\u2026", "..."),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(HERE / name / "tokenizer.json"))


def save(model, name):
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    config = HERE / name / "config.json"
    found = json.loads(config.read_text())
    found.pop("transformers_version", None)
    config.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for name, (vision, text) in NAFLEX.items():
        naflex(name, vision, text, rng)
        tokenizer(name, text["max_position_embeddings"], text["vocab_size"])
    for name, (vision, text) in FIXED.items():
        fixed(name, vision, text, rng)
    for name in FIXED:
        text = FIXED[name][1]
        pieces(name, text["max_position_embeddings"], text["vocab_size"])
    gemma()
