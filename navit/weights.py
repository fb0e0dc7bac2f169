"""Loads models from every supported format, and saves them."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from navit import config as config_lib
from navit.config import (
    Classification,
    Config,
    DataConfig,
    Folder,
    Loss,
    ModelConfig,
    Sigmoid,
    TextConfig,
    TrainConfig,
)
from navit.config.towers import check_towers
from navit.convert import big_vision, huggingface, native_towers
from navit.convert.stored import Weights, build, name_of, shapes_of
from navit.embed import Embedder
from navit.files import replacing
from navit.model.two_tower import TwoTower
from navit.sharding import Rules
from navit.sources.bucket import is_url
from navit.train.workdir import is_workdir

log = logging.getLogger("navit")

FORMATS = ("huggingface", "big_vision", "navit", *native_towers.FAMILIES)
_FAMILY = "model.vision.family="


def load(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    rules: Rules = Rules(),
    raw: bool = False,
) -> Embedder:
    """Loads a model; its format is detected by content.

    Args:
      path: a work directory of `navit train`, also behind a URL such as gs://; a
        Hugging Face directory of a `Siglip2Model` or `SiglipModel`, a big_vision
        `.npz`, or a directory with one of the other image towers in docs/weights.md.
      overrides: settings that decide how it runs, such as `"model.dtype=bfloat16"` or
        `"model.text.tokenizer=gemma.model"`.
      rules: how to split the parameters over the current mesh; by default, on one
        device.
      raw: of a run with `optim.ema`, the weights that training updates; by default,
        their moving average.

    Raises:
      TypeError: if `path` is not a path, or `overrides` is one text.
      FileNotFoundError: if `path` does not exist, or has no model.
      ValueError: names what is damaged, missing or unknown.
    """
    if isinstance(overrides, str):
        raise TypeError(
            f"overrides is {overrides!r}, but should be a list: pass [{overrides!r}]"
        )
    if is_url(path):
        return _load_url(str(path), overrides, rules, raw=raw)
    path = _path(path)
    if is_workdir(path):
        return _load_workdir(path, overrides, rules, raw=raw)
    weights, config = _read(path, overrides)
    return Embedder(build(weights, config.model, rules), config, step=0)


def read(
    path: str | Path, *, overrides: Sequence[str] = (), raw: bool = False
) -> Weights:
    """Opens what `load` takes, to read it tensor by tensor; raises the same errors."""
    if is_url(path):
        return weights_of(_load_url(str(path), overrides, raw=raw))
    path = _path(path)
    if is_workdir(path):
        return weights_of(_load_workdir(path, overrides, raw=raw))
    return _read(path, overrides)[0]


def _path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path is {path!r}, but should be the name of a directory or an .npz: pass "
            "a str or a Path"
        )
    if not str(path):
        raise ValueError("path is empty: name a directory or an .npz")
    return Path(path).expanduser()


def _read(path: Path, overrides: Sequence[str]) -> tuple[Weights, Config]:
    """Released weights, and the config that they run with."""
    family = None
    for assignment in overrides:
        if assignment.startswith(_FAMILY):
            family = assignment.removeprefix(_FAMILY)
    weights = _with_tokenizer(_open(path, family))
    data = DataConfig(train=Folder(), eval=Folder(), strategy=weights.strategy)
    train = TrainConfig(losses=_losses(weights.model))
    config = Config(model=weights.model, data=data, train=train)
    config = config_lib.override(config, overrides)
    check_towers(
        weights.model,
        config.model,
        where=weights.where,
        remedy="leave the model to the weights",
    )
    v, text = config.model.vision, config.model.text
    if v.fixed_grid and not v.image_size and path.is_file():
        side = v.position.size * v.patch_size
        log.info(
            "%s: assuming images of %d pixels a side; model.vision.image_size=... if "
            "not",
            path,
            side,
        )
    if text != weights.model.text:  # another tokenizer: the sizes are the same
        assert text is not None
        weights = dataclasses.replace(weights, files=_files(text))
    weights = dataclasses.replace(
        weights, model=config.model, strategy=config.data.strategy
    )
    return weights, config


def _losses(model: ModelConfig) -> tuple[Loss, ...]:
    """The loss that could train a model; none for an image tower by itself."""
    if model.text is not None:
        return (Sigmoid(),)
    return (Classification(),) if model.vision.num_classes else ()


def _open(path: Path, family: str | None = None) -> Weights:
    """Opens released weights; `family` chooses one of several towers."""
    if huggingface.is_huggingface(path):
        native = native_towers.find(path, family)
        return native_towers.read(path, native) if native else huggingface.read(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise ValueError(
            f"{path} is one file of a Hugging Face directory: name the directory, "
            f"{path.parent}"
        )
    if big_vision.is_big_vision(path):
        return big_vision.read(path)
    if not path.exists():
        message = f"{path} does not exist"
        if len(path.parts) == 2 and not path.parent.exists():
            message += (
                "; if that is its name on the Hugging Face hub, download it first: "
                f"hf download {path} --local-dir {path.name}"
            )
        raise FileNotFoundError(message)
    raise FileNotFoundError(
        f"{path} is not a navit work directory (it has no checkpoints/), a Hugging "
        "Face directory (config.json and *.safetensors) or a big_vision .npz"
    )


def weights_of(model: Embedder) -> Weights:
    """A loaded model in the form that every writer takes."""
    leaves = jax.tree_util.tree_flatten_with_path(model.model)[0]
    tensors = {name_of(path): leaf for path, leaf in leaves}
    return Weights(
        model.config.model,
        lambda name: np.asarray(tensors[name]),
        where="the model",
        files=_files(model.config.model.text),
        strategy=model.config.data.strategy,
    )


def _files(text: TextConfig | None) -> tuple[Path, ...]:
    if text is None or text.tokenizer is None:
        return ()
    tokenizer = Path(text.tokenizer).expanduser()
    return (tokenizer,) if tokenizer.is_file() else ()


def save(model: Embedder, path: str | Path, format: str | None = None) -> None:
    """Writes a model in any supported format: the inverse of `load`.

    Args:
      path: a directory, or an `.npz` for "big_vision".
      format: "huggingface", "big_vision", "navit", or the family of an image tower:
        "moonvit", "qwen_vl", "ovis", "pixtral" or "timm". None means big_vision for a
        path that ends in .npz; else the family that the tower was read from
        (`model.vision.family`), without the text tower that training may have added;
        else huggingface.

    Raises:
      TypeError: if `model` is not a model, or `path` not a path.
      ValueError: names a setting of the model that the format lacks.
    """
    if not isinstance(model, Embedder):
        raise TypeError(
            f"model is {model!r}, but should be one from navit.load: call "
            "navit.save(model, path)"
        )
    write(weights_of(model), _path(path), format, config=model.config)


def write(
    weights: Weights,
    out: Path,
    format: str | None = None,
    *,
    config: Config | None = None,
) -> str:
    """Writes weights, tensor by tensor if the format allows it; see `save`.

    Args:
      config: the rest of the config to store in a work directory.

    Returns:
      The format that was written.
    """
    layout = native_towers.layout_of(weights.model)
    format = format or ("big_vision" if out.suffix == ".npz" else layout)
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    if out.suffix in (".safetensors", ".bin", ".pt"):
        raise ValueError(
            f"{out} names one file, but a Hugging Face model is a directory: write to "
            f"one, such as {out.with_suffix('')}, or to an .npz for big_vision"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} already exists: choose another path, or delete it"
        )
    if format == "huggingface" and layout != "timm":
        format = layout
    if format in native_towers.FAMILIES:
        native_towers.write(weights, out, format)
    elif format == "huggingface":
        huggingface.write(weights, out)
    elif format == "big_vision":
        big_vision.write(weights, out)
    else:
        train = TrainConfig(losses=_losses(weights.model))
        data = DataConfig(strategy=weights.strategy)
        config = config or Config(train=train, data=data, model=weights.model)
        config = dataclasses.replace(config, model=weights.model)
        _write_workdir(weights, out, config)
    return format


def _load_workdir(
    path: Path,
    overrides: Sequence[str] = (),
    rules: Rules = Rules(),
    *,
    raw: bool = False,
) -> Embedder:
    from navit.train.checkpoint import Checkpoints  # orbax is slow to import

    checkpoints = Checkpoints(path)
    try:
        saved = checkpoints.config()
        config = config_lib.override(saved, overrides)
        if shapes_of(config.model) != shapes_of(saved.model):
            check_towers(
                saved.model,
                config.model,
                where=str(path),
                remedy="leave the sizes of the model to the weights",
            )
        make = functools.partial(TwoTower, config.model, rules)
        like = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        model, step = checkpoints.restore_model(like, raw=raw)
        return Embedder(model, config, step=step)
    finally:
        checkpoints.close()


def _load_url(
    url: str,
    overrides: Sequence[str] = (),
    rules: Rules = Rules(),
    *,
    raw: bool = False,
) -> Embedder:
    """Loads a work directory behind a URL; keeps its tokenizer until the exit."""
    from navit.train import remote_workdir

    with remote_workdir.reading(url) as workdir:
        model = _load_workdir(workdir, overrides, rules, raw=raw)
        text = model.config.model.text
        if text is None or text.tokenizer is None:
            return model
        tokenizer = Path(text.tokenizer)
        if not tokenizer.is_relative_to(workdir):
            return model
        kept = Path(tempfile.mkdtemp(prefix="navit-")) / tokenizer.name
        atexit.register(shutil.rmtree, kept.parent, ignore_errors=True)
        shutil.copyfile(tokenizer, kept)
        override = [f"model.text.tokenizer={kept}"]
        config = config_lib.override(model.config, override)
        return Embedder(model.model, config, step=model.step)


def _write_workdir(weights: Weights, out: Path, config: Config) -> None:
    from navit.train.checkpoint import Checkpoints

    with replacing(out, folder=True) as temporary:
        checkpoints = Checkpoints(temporary, keep=1)
        try:
            checkpoints.save_model(build(weights, weights.model), config)
        finally:
            checkpoints.close()
        for file in weights.files:
            shutil.copyfile(file, temporary / file.name)


def _with_tokenizer(weights: Weights) -> Weights:
    """Takes a tokenizer found beside the weights as the model's."""
    if not weights.files or weights.model.text is None:
        return weights
    text = dataclasses.replace(weights.model.text, tokenizer=str(weights.files[0]))
    model = dataclasses.replace(weights.model, text=text)
    return dataclasses.replace(weights, model=model)
