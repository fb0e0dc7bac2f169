"""What `import navit` gives, as a user has it: in a process without test hooks.

One process serves all tests: it loads a model, embeds, and makes mistakes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import navit

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/siglip2_b"

# Calls with an argument of a wrong type, and the error they get.
MISTAKES = {
    "navit.load(3)": ("TypeError", "path is 3, but", "pass a str or a Path"),
    "navit.save(model, None)": ("TypeError", "path is None, but", "pass a str"),
    "model.embed_images('cat.jpg')": ("ValueError", "('cat.jpg')", "pass [image]"),
    "model.embed_images(b'GIF')": ("ValueError", "<class 'bytes'>", "pass [image]"),
    "model.embed_images(image)": ("ValueError", "numpy.ndarray", "pass [image]"),
    "model.embed_images(3)": ("TypeError", "images is 3, but", "[image]"),
    "model.embed_images([golden])": ("ValueError", "image 0 (", "siglip2_b"),
    "model.embed_images([3])": ("ValueError", "image 0", "not a int"),
    "model.embed_images([image], '256')": ("TypeError", "max_tokens is '256'", "256"),
    "model.embed_images([image], 2.5)": ("TypeError", "max_tokens is 2.5", "256"),
    "model.embed_images([image], 0)": ("ValueError", "max_tokens", "not 0"),
    "model.embed_texts('a cat')": ("ValueError", "('a cat')", "pass [text]"),
    "model.embed_texts(3)": ("TypeError", "texts is 3, but", "[text]"),
    "model.embed_texts({'a'})": ("TypeError", "texts is {'a'}, but", "[text]"),
    "model.embed_texts(['a', 3])": ("TypeError", "texts[1] is 3, but", "a str"),
    "navit.pack(3)": ("TypeError", "images is 3, but", "[image]"),
    "navit.pack('cat.jpg')": ("ValueError", "('cat.jpg')", "pass [image]"),
    "navit.pack([image], max_tokens='9')": ("TypeError", "max_tokens is '9'", "whole"),
    "navit.pack([image], row_tokens=9.5)": ("TypeError", "row_tokens is 9.5", "whole"),
    "navit.pack([image], slots='1')": ("TypeError", "slots is '1'", "whole number"),
    "navit.grid_for(9, 9, max_tokens='9')": ("TypeError", "max_tokens is '9'", "whole"),
    "navit.grid_for('480', 9)": ("TypeError", "height is '480'", "pixels"),
    "navit.open_source('data')": (
        "TypeError",
        "'data' is not a source",
        "Folder(path)",
    ),
    "navit.train_batches('a.py')": ("TypeError", "cfg is 'a.py', but", "navit.Config("),
    "navit.train_batches(model.config, 'data')": (
        "TypeError",
        "source is 'data', but",
        "pass navit.open_source(source)",
    ),
    "navit.load('')": ("ValueError", "path is empty", "name a directory"),
    "navit.load(golden, overrides='a.b=1')": ("TypeError", "'a.b=1'", "pass ['a.b=1']"),
    "navit.save('/no/x', model)": ("TypeError", "'/no/x'", "navit.save(model, path)"),
    "navit.unpack(out)": ("TypeError", "VisionOutput", "pass out.packed"),
    "navit.unpack(out.tokens)": ("TypeError", "without the layout", "pass out.packed"),
    "model.vision([image])": ("TypeError", "not a list", "navit.pack(images)"),
    "model.logits(z, ['a cat'])": (
        "TypeError",
        "texts is a list",
        "embed_texts(texts)",
    ),
    "model.logits([image], z)": (
        "TypeError",
        "images is a list",
        "embed_images(images",
    ),
    "model.embed_images([image, broken])": ("ValueError", "image 1 (", "broken.jpg"),
    "navit.pack([image, broken])": ("ValueError", "image 1 (", "broken.jpg"),
    "next(model.features([broken]))": ("ValueError", "image 0 (", "broken.jpg"),
}
# flax itself imports optax, so that one is not here.
HEAVY = ("orbax", "grain", "tensorstore", "matplotlib", "navit.train.checkpoint")

CODE = """
import json, sys
mistakes, heavy, golden, broken = json.loads(sys.argv[1])
import numpy as np
import navit
model = navit.load(golden)
image = np.zeros((40, 50, 3), np.uint8)
z, out = model.embed_images([image]), model.vision(navit.pack([image], patch_size=3))
shapes = [list(model.embed_images([image]).shape), list(model.embed_texts(["a"]).shape)]
loaded = [name for name in heavy if name in sys.modules]
errors = {}
for call in mistakes:
    try:
        eval(call)
    except Exception as error:
        errors[call] = type(error).__name__, str(error)
print(json.dumps([shapes, loaded, errors]))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    # The header can be read, the pixels cannot.
    broken = tmp_path_factory.mktemp("images") / "broken.jpg"
    broken.write_bytes((ROOT / "data/sample/cat.jpg").read_bytes()[:3000])
    given = json.dumps([list(MISTAKES), HEAVY, str(GOLDEN), str(broken)])
    out = subprocess.run(
        [sys.executable, "-c", CODE, given],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def test_loading_weights_and_embedding_an_image_imports_no_training(outcome):
    shapes, loaded, _ = outcome
    assert shapes == [[1, 30], [1, 30]]
    assert loaded == []


def test_every_public_name_loads_and_is_documented():
    for name in navit.__all__:
        assert getattr(navit, name).__doc__, name


@pytest.mark.parametrize("call", MISTAKES)
def test_an_argument_of_a_wrong_type_gets_a_clear_error(outcome, call):
    kind, *parts = MISTAKES[call]
    name, message = outcome[2][call]
    assert name == kind
    for part in parts:
        assert part in message
    assert "\n" not in message
