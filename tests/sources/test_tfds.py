"""navit.sources.tfds: prepared datasets, without TensorFlow."""

import csv
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import read_image

from navit.config import Folder, Tfds
from navit.sources.kinds import open_source

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
ROWS = list(csv.DictReader((SAMPLE / "captions.csv").read_text().splitlines()))
CLASSES = sorted({row["label"] for row in ROWS})


class SamplePairs(tfds.core.GeneratorBasedBuilder):
    """The sample, with captions as coco_captions has them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "id": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(ROWS[:12]),
            "test": self._generate_examples(ROWS[12:]),
        }

    def _generate_examples(self, rows):
        for i, row in enumerate(rows):
            texts = [row["caption"], "second"]
            yield (
                i,
                {
                    "image": io.BytesIO((SAMPLE / row["file"]).read_bytes()),
                    "captions": [
                        {"id": k, "text": text} for k, text in enumerate(texts)
                    ],
                    "text": row["caption"],
                    "label": row["label"],
                    "id": i,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    for stored in ("array_record", "parquet"):
        builder = SamplePairs(data_dir=root / stored, file_format=stored)
        builder.download_and_prepare()
    return root


def by_image(source) -> dict[bytes, int]:
    return {read_image(source, i): i for i in range(len(source))}


@pytest.mark.parametrize("stored", ["array_record", "parquet"])
def test_a_prepared_dataset_equals_the_files_it_was_made_of(prepared, stored):
    folder = open_source(Folder(str(SAMPLE)))
    place = by_image(folder)
    found = set()
    for split, rows in (("train", ROWS[:12]), ("test", ROWS[12:])):
        source = open_source(
            Tfds(
                "sample_pairs",
                split=split,
                data_dir=str(prepared / stored),
                caption="captions.text",
            )
        )
        assert len(source) == len(rows)
        task = source.tasks["label"]
        assert task.class_names == tuple(CLASSES)
        for i in range(len(source)):
            j = place[read_image(source, i)]  # the same bytes: nothing was decoded
            found.add(j)
            assert source.record(i).captions == (*folder.record(j).captions, "second")
            assert source.sizes[i].tolist() == folder.sizes[j].tolist()
            labels = folder.tasks["label"].labels
            assert task.labels[i] == labels[j]
        copy = pickle.loads(pickle.dumps(source))
        assert read_image(copy, 3) == read_image(source, 3)
    assert found == set(range(17))


def options(prepared, **change) -> Tfds:
    given = {"name": "sample_pairs", "data_dir": str(prepared / "array_record")}
    return Tfds(**{**given, "caption": "text", **change})


def test_a_part_of_a_split_and_a_version(prepared):
    whole = open_source(options(prepared))
    parts = [
        open_source(options(prepared, name="sample_pairs:1.0.0", split=split))
        for split in ("train[:50%]", "train[50%:]")
    ]
    names = [set(by_image(part)) for part in parts]
    assert len(names[0]) == 6 and names[0].isdisjoint(names[1])
    assert names[0] | names[1] == set(by_image(whole))
    assert len({s.fingerprint() for s in (whole, *parts)}) == 3


def test_a_part_of_a_split_of_parquet_is_refused(prepared):
    """TFDS would read the whole split, and training would see the held-out part."""
    wrong = options(prepared, data_dir=str(prepared / "parquet"), split="train[:50%]")
    with pytest.raises(ValueError, match=r"has 6 examples.*gives 12"):
        open_source(wrong)


def test_a_class_is_the_caption_where_there_is_none(prepared):
    source = open_source(options(prepared, caption=""))
    task = source.tasks["label"]
    assert source.record(5).captions == (task.class_names[task.labels[5]],)
    assert open_source(options(prepared, label="")).tasks == {}


def test_class_names_replace_those_of_the_dataset(prepared, tmp_path):
    """As for ImageNet, whose classes TFDS names by WordNet numbers."""
    path = tmp_path / "names.txt"
    path.write_text("\n".join(name.upper() for name in CLASSES))
    own = open_source(options(prepared)).tasks["label"]
    task = open_source(options(prepared, classes=str(path))).tasks["label"]
    assert task.class_names == tuple(name.upper() for name in own.class_names)
    np.testing.assert_array_equal(task.labels, own.labels)
    path.write_text("a\nb")
    with pytest.raises(ValueError, match=r"names 2 classes, and .* has 7"):
        open_source(options(prepared, classes=str(path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "no name"),
        ({"name": "no_such_set"}, r"no_such_set is not prepared in .*tfds build"),
        ({"split": "tran"}, r"tran.*train"),
        ({"image": "img"}, r"no 'img' \(it has: .*image"),
        ({"image": "text"}, "'text' is not an image"),
        ({"caption": "captoin"}, r"no 'captoin' \(it has: .*captions"),
        ({"caption": "captions.txt"}, r"no 'txt' \(it has: id, text\)"),
        ({"caption": "text.text"}, r"no 'text'"),
        ({"label": "class"}, r"no 'class' \(it has: "),
        ({"caption": "", "label": ""}, "neither a caption nor a label"),
        ({"caption": "captions.id"}, "a caption must be text, not"),
    ],
)
def test_what_is_wrong_is_named(prepared, change, words):
    with pytest.raises(ValueError, match=words):
        open_source(options(prepared, **change))


def test_nothing_needs_tensorflow(prepared):
    code = (
        "import sys; from navit.config import Tfds;"
        "from navit.sources.kinds import open_source;"
        "s = open_source(Tfds('sample_pairs', data_dir=sys.argv[1], caption='text'));"
        "assert len(s) == 12 and all(s.record(0));"
        "print([m for m in ('tensorflow', 'jax') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(prepared / "array_record")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (out.returncode, out.stdout.strip()) == (0, "[]"), out.stderr


def test_without_tfds_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install tensorflow-datasets"):
        open_source(Tfds("mnist"))
