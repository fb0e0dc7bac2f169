"""TextCaps as a TFDS dataset, from the files of https://textvqa.org/textcaps/dataset.

    python data/builders/textcaps.py DIR [DATA_DIR]

`DIR` holds the annotations `TextCaps_0.1_train.json` and `TextCaps_0.1_val.json`, and
`train_images`, the folder with the images of both that `train_val_images.zip` unpacks
to. A split without annotations is left out. The test set's captions are not published.
"""

import json
import sys

import tensorflow_datasets as tfds


class Textcaps(tfds.core.GeneratorBasedBuilder):
    """Photographs that contain text, with captions that refer to it."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://textvqa.org/textcaps",
            license="captions CC BY 4.0; the images come from Open Images, CC BY 2.0",
        )

    def _split_generators(self, dl_manager):
        root = dl_manager.manual_dir
        files = {s: root / f"TextCaps_0.1_{s}.json" for s in ("train", "val")}
        splits = {
            split: self._generate_examples(file, root / "train_images")
            for split, file in files.items()
            if file.exists()
        }
        if not splits:
            raise FileNotFoundError(f"there is no TextCaps_0.1_train.json in {root}")
        return splits

    def _generate_examples(self, annotations, folder):
        captions = {}
        for row in json.loads(annotations.read_text(encoding="utf-8"))[
            "data"
        ]:  # one row per caption
            captions.setdefault(row["image_id"], []).append(row["caption_str"])
        for image, texts in captions.items():
            yield (
                image,
                {
                    "image": folder / f"{image}.jpg",
                    "captions": texts,
                    "image_id": image,
                },
            )


def main(manual_dir, data_dir=None):
    """Prepares the dataset in `data_dir` (TFDS's own), without TensorFlow."""
    builder = Textcaps(data_dir=data_dir, file_format="array_record")
    download = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=download)


if __name__ == "__main__":
    main(*sys.argv[1:])
