"""Flickr30k as a TFDS dataset, from the files that its authors distribute.

    python data/builders/flickr30k.py DIR [DATA_DIR]

`DIR` holds the unpacked archives of https://shannon.cs.illinois.edu/DenotationGraph:
the folder `flickr30k-images`, and `results_20130124.token` with lines of
`FILE#NUMBER<TAB>CAPTION`. With Karpathy's `dataset_flickr30k.json` beside them, the
splits are those of the retrieval literature (29,000 train, 1,014 val, 1,000 test), and
images that it does not name are left out. Without it there is one split, `full`.
"""

import collections
import json
import sys

import tensorflow_datasets as tfds


class Flickr30k(tfds.core.GeneratorBasedBuilder):
    """31,783 photographs of people doing something, five captions each."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "filename": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://shannon.cs.illinois.edu/DenotationGraph/",
            license="the images are Flickr's users'; for non-commercial research",
        )

    def _split_generators(self, dl_manager):
        root = dl_manager.manual_dir
        captions = _captions(root / "results_20130124.token")
        splits = root / "dataset_flickr30k.json"
        names = {"full": sorted(captions)}
        if splits.exists():
            names = collections.defaultdict(list)
            for image in json.loads(splits.read_text(encoding="utf-8"))["images"]:
                names[image["split"]].append(image["filename"])
        return {
            split: self._generate_examples(root / "flickr30k-images", files, captions)
            for split, files in names.items()
        }

    def _generate_examples(self, folder, files, captions):
        for file in files:
            yield (
                file,
                {
                    "image": folder / file,
                    "captions": captions[file],
                    "filename": file,
                },
            )


def _captions(path):
    """File name -> its captions, in the order of their numbers."""
    captions = collections.defaultdict(dict)
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            name, caption = line.split("\t", 1)
            file, number = name.rsplit("#", 1)
            captions[file][int(number)] = caption.strip()
    return {
        file: [text for _, text in sorted(numbered.items())]
        for file, numbered in captions.items()
    }


def main(manual_dir, data_dir=None):
    """Prepares the dataset in `data_dir` (TFDS's own), without TensorFlow."""
    builder = Flickr30k(data_dir=data_dir, file_format="array_record")
    download = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=download)


if __name__ == "__main__":
    main(*sys.argv[1:])
