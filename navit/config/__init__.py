"""The configuration of a run; every public name is importable from here."""

from typing import Any

from navit.config import overrides
from navit.config.data import Crop as Crop
from navit.config.data import DataConfig as DataConfig
from navit.config.data import Sides as Sides
from navit.config.data import TokenDrop as TokenDrop
from navit.config.evaluation import EvalConfig as EvalConfig
from navit.config.evaluation import EvalTask as EvalTask
from navit.config.experiment import Config as Config
from navit.config.experiment import MeshConfig as MeshConfig
from navit.config.experiment import TrainConfig as TrainConfig
from navit.config.experiment import load as load
from navit.config.experiment import run_file as run_file
from navit.config.losses import Classification as Classification
from navit.config.losses import Loss as Loss
from navit.config.losses import Sigmoid as Sigmoid
from navit.config.losses import Softmax as Softmax
from navit.config.model import ROUNDING as ROUNDING
from navit.config.model import MergerConfig as MergerConfig
from navit.config.model import ModelConfig as ModelConfig
from navit.config.model import TextConfig as TextConfig
from navit.config.optim import OptimConfig as OptimConfig
from navit.config.overrides import differences as differences
from navit.config.overrides import override as override
from navit.config.overrides import to_json as to_json
from navit.config.saved import upgraded
from navit.config.sources import STREAM
from navit.config.sources import AnySource as AnySource
from navit.config.sources import ArrayRecords as ArrayRecords
from navit.config.sources import Folder as Folder
from navit.config.sources import Mixture as Mixture
from navit.config.sources import ParquetImages as ParquetImages
from navit.config.sources import Synthetic as Synthetic
from navit.config.sources import TarShards as TarShards
from navit.config.sources import Tfds as Tfds
from navit.config.sources import TfRecords as TfRecords
from navit.config.study import Study as Study
from navit.config.vision import PositionConfig as PositionConfig
from navit.config.vision import RotaryConfig as RotaryConfig
from navit.config.vision import VisionConfig as VisionConfig


def __getattr__(name: str) -> Any:
    if name == "Stream":
        raise ImportError(f"Stream was removed: {STREAM}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_json(data: Any) -> Config:
    """Rebuilds the config that `to_json` wrote, in this version or an earlier one.

    Raises the same errors as `overrides.from_json`.
    """
    return overrides.from_json(upgraded(data), Config)
