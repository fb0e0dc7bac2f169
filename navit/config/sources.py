"""The sources of images that a config may name: frozen dataclasses without readers.

Paths may start with `~`, or be URLs of any file system that fsspec knows (`gs://`,
`s3://`); ArrayRecord and TFDS behind a URL need `data.cache`. `docs/data.md` has an
example of each. On a command line, the `short` name of a class chooses it:
`data.train=tars:PATH`. A file of `classes` has one class name per line, or is JSON
(`FILE.json#KEY`), as `navit/sources/names.py` reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# What replaces a `Stream`, for configs that still name one.
STREAM = (
    "write tar shards once, with `navit reshard tars:PATH OUT` (tfrecord:PATH for "
    "TFRecord), and set data.train=tars:OUT"
)


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The built-in offline dataset (`navit/sources/synthetic.py`).

    `task`: the one whose classes label the images in training; evaluation has all.
    `aspect`: the range of the longer side over the shorter.
    """

    short = "synthetic"
    size: int = 20_000
    seed: int = 0
    task: Literal["coarse", "fine", "finest"] = "coarse"
    aspect: tuple[float, ...] = (1.0, 6.0)

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise ValueError(f"size must be positive, not {self.size}")
        if len(self.aspect) != 2 or not 1 <= self.aspect[0] <= self.aspect[1] <= 6:
            raise ValueError(
                f"aspect must be a range within 1 to 6, as (1.0, 6.0), not "
                f"{self.aspect}"
            )


@dataclasses.dataclass(frozen=True)
class Folder:
    """Photographs in `path` (URLs too) with a table of `file[,caption][,label]`.

    `table` is a CSV, JSONL or Parquet file, relative to `path`; None means the only
    one there. It may also be Karpathy's JSON of COCO or Flickr30k, with the splits to
    read: `dataset_coco.json#train+restval`. `split` keeps every image ("all"), or sets
    a share `holdout` of them aside by a hash of the file name: "eval" is that part, and
    "train" is the rest.
    `missing`: the share of the table's files that may be missing, and of its rows that
    may have neither a caption nor a label; 0 allows none.
    As `data.eval`, a `path` of None means the folder of `data.train` with its
    `missing`, and its table too if `table` is None.
    """

    short = "folder"
    path: str | None = None
    table: str | None = None
    split: Literal["all", "train", "eval"] = "all"
    holdout: float = 0.1
    missing: float = 0.0

    def __post_init__(self) -> None:
        _check_missing(self.missing)
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"holdout must be a share between 0 and 1, not {self.holdout}"
            )


@dataclasses.dataclass(frozen=True)
class TarShards:
    """Tar files of `KEY.jpg` with `KEY.txt`, `KEY.json` or `KEY.cls` (WebDataset).

    `path`: `~/cc12m/{00000..01242}.tar`, a glob, or a folder of .tar files; URLs too.
    Compressed ones (.tar.gz) are for `navit reshard` only.
    `caption`, `label`: the member's extension, and for a .json also the field, as
    `json.caption` or `json.meta.title`. A caption of None means the .txt, or else the
    field `caption` of the .json. `classes`: a file of class names.
    `missing`: the share of the shards that may be missing.
    """

    short = "tars"
    path: str = ""
    caption: str | None = None
    label: str = "cls"
    classes: str | None = None
    missing: float = 0.0

    def __post_init__(self) -> None:
        _check_missing(self.missing)


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """ArrayRecord files of serialized `tf.train.Example`, read without TensorFlow.

    `path`: as in `TarShards`. `image` (encoded bytes), `caption` (bytes, one
    or several) and `label` (an integer or bytes) are names of features. For `caption`
    and `label`, None means the feature of that name if there is one, and an empty name
    means none. `classes`: a file of class names.
    `missing`: the share of the files that may be missing.
    """

    short = "array_record"
    path: str = ""
    image: str = "image"
    caption: str | None = None
    label: str | None = None
    classes: str | None = None
    missing: float = 0.0

    def __post_init__(self) -> None:
        _check_missing(self.missing)


@dataclasses.dataclass(frozen=True)
class TfRecords(ArrayRecords):
    """TFRecord files of `tf.train.Example`, which only `navit reshard` reads."""

    short = "tfrecord"


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared TensorFlow dataset, stored as ArrayRecord; needs no TensorFlow.

    `name`: `coco_captions`, `imagenet2012:5.1.0`, `my_set/its_config`. `split`:
    `train`, `validation[:50%]`. `data_dir`: None means TFDS's default. `image`,
    `caption` and `label` are names of features, nested ones as `captions.text`; None
    and empty names are as in `ArrayRecords`. Class names are those of the dataset, or
    those of the file `classes`.
    """

    short = "tfds"
    name: str = ""
    split: str = "train"
    data_dir: str | None = None
    image: str = "image"
    caption: str | None = None
    label: str | None = None
    classes: str | None = None


@dataclasses.dataclass(frozen=True)
class ParquetImages:
    """Parquet files whose rows contain the images, like Hugging Face's datasets.

    `path`: as in `TarShards`. `image`: a column of bytes, or of structs with `bytes`.
    `caption` (text, or a list of texts) and `label` (an integer or text) are columns
    too; None and empty names are as in `ArrayRecords`. Reading an image reads its whole
    row group: write small ones. `classes`: a file of class names.
    `missing`: the share of the files that may be missing.
    """

    short = "parquet"
    path: str = ""
    image: str = "image"
    caption: str | None = None
    label: str | None = None
    classes: str | None = None
    missing: float = 0.0

    def __post_init__(self) -> None:
        _check_missing(self.missing)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources as one, with images drawn from each by `weights`.

    Weights are shares of the images drawn and need not sum to 1; if empty, every image
    is drawn alike.
    """

    sources: tuple[Single, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mixture needs sources, as sources=(Folder(...), ...)")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"{len(self.sources)} sources need one weight each, not "
                f"{len(self.weights)} weights"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights must be positive, not {self.weights}")


def _check_missing(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"missing must be a share between 0 and 1, not {share}")


Single = (
    Synthetic | Folder | TarShards | ArrayRecords | TfRecords | Tfds | ParquetImages
)
AnySource = Single | Mixture


def words(source: Single) -> list[str]:
    """A source on a command line: `KIND:PATH`, and `field=value` for what is set."""
    first, *rest = dataclasses.fields(source)
    return [f"{source.short}:{getattr(source, first.name)}"] + [
        f"{field.name}={getattr(source, field.name)}"
        for field in rest
        if getattr(source, field.name) != field.default
    ]
