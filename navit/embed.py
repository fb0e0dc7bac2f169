"""A trained model for its users: images and texts in, unit vectors out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from navit import embed_features, embed_views
from navit.config import Config
from navit.embed_batches import batches, budget_of, shared_by_devices
from navit.embed_rows import vectors_of
from navit.embed_views import ViewFeatures
from navit.input import fill, tokens
from navit.model.merger import Merger
from navit.model.text import Text
from navit.model.two_tower import TwoTower, normalize
from navit.model.vision import Vision
from navit.plan.geometry import check_count
from navit.plan.strategies import NativeStrategy, Strategy
from navit.sources.images import ArrayLike, ImageLike, image_name, sizes_of
from navit.sources.source import Record

log = logging.getLogger("navit")


class Embedded(NamedTuple):
    """What `Embedder.embed_source` returns.

    Attributes:
      vectors: float32 `[m, e]`; 0 for an image that cannot be read.
      errors: with several processes, each has those of the images that it decodes.
    """

    vectors: np.ndarray
    errors: fill.Errors


class Embedder:
    """A model with its config: `embed_images`, `embed_texts`, `logits`, and the towers.

    Attributes:
      vision: packed images -> tokens and pooled vectors.
      text: token ids `[m, t]` -> vectors `[m, e]`, before normalisation.
      config: what the model was trained with.
      step: how many steps it was trained for.
    """

    def __init__(self, model: TwoTower, config: Config, *, step: int) -> None:
        self.model, self.config, self.step = model, config, step

    @property
    def vision(self) -> Vision:
        return self.model.vision

    @property
    def text(self) -> Text:
        if self.model.text is None:
            raise ValueError("this model was trained without a text tower")
        return self.model.text

    @property
    def merger(self) -> Merger:
        """Tokens of the image tower -> what its language model gets."""
        if self.model.merger is None:
            raise ValueError("this model has no merger: take its own tokens")
        return self.model.merger

    @property
    def embed_dim(self) -> int:
        """The size of the vectors."""
        config = self.vision.config
        if config.pool == "none":
            raise ValueError('a model with pool="none" embeds tokens, not images')
        return config.embed_dim or config.width

    def embed_images(
        self,
        images: Sequence[ImageLike] | ArrayLike,
        max_tokens: int | None = None,
        *,
        strategy: Strategy | None = None,
    ) -> np.ndarray:
        """Embeds images of any sizes: float32 `[len, e]`, unit norm, in order.

        Args:
          images: arrays `(h, w, 3)` uint8 (numpy, jax or torch), PIL images, paths,
            open files, or files' contents.
          max_tokens: the token budget of each. If the model's own strategy makes one
            view of each image (QwenVL, Kimi, Pixtral, NaFlex), its bound is about this.
          strategy: embed each image's views by this rule (`navit.strategies`), in place
            of a budget. An image's vector is then the mean of its views' pooled
            vectors, each weighted by its view's tokens.

        With neither, the model's own strategy (`config.data.strategy`), or else a
        budget of 256 tokens.

        Raises:
          TypeError: if `images` is not a list, or `max_tokens` not a whole number.
          ValueError: names the first image that cannot be read, or that the strategy
            refuses.
        """
        if not len(sizes := sizes_of(images)):
            return np.zeros((0, self.embed_dim), np.float32)
        vectors, errors = self.embed_source(
            lambda i: Record(images[i]), sizes, max_tokens, strategy=strategy, stop=True
        )
        for index, error in errors:
            raise ValueError(
                f"{image_name(images, index)} cannot be embedded: {error}"
            ) from error
        return vectors

    def embed_source(
        self,
        read: Callable[[int], Record],
        sizes: np.ndarray,
        max_tokens: int | None = None,
        *,
        strategy: Strategy | None = None,
        stop: bool = False,
        normalized: bool = True,
        progress: str | None = None,
    ) -> Embedded:
        """Embeds images as `embed_images` does, but reads them on demand.

        Args:
          read: index -> record, from several threads.
          sizes: `[m, 2]` (height, width) of each.
          max_tokens, strategy: as in `embed_images`.
          stop: return at an image that cannot be read, without the images after it.
          normalized: return vectors of unit norm; if False, as they are pooled.
          progress: show a progress bar of this name on the terminal.

        Raises:
          ValueError: if a grid extends beyond the model's position table, or the budget
            needs more memory than is free.
        """
        max_tokens, strategy = self._rule(max_tokens, strategy)
        errors: fill.Errors = []
        views = None
        if strategy is not None:
            views, row_tokens, planned = embed_views.batches(
                self.config, read, sizes, strategy
            )
            errors += views.refused
        else:
            row_tokens = budget_of(self.config, max_tokens)
            planned = batches(self.config, read, sizes, row_tokens)
        out = np.zeros((len(sizes), self.embed_dim), np.float32)
        on_device = normalized and views is None
        with tqdm(
            total=len(sizes),
            desc=progress,
            unit="image",
            disable=None if progress else True,
            leave=False,
        ) as bar:
            for part, filled in planned:
                errors += filled.errors
                if errors and stop:
                    break
                vectors = vectors_of(
                    self.vision, part, filled, row_tokens, normalized=on_device
                )
                if views is None:
                    out[part.index] = vectors
                else:
                    embed_views.add_views(out, part, views, vectors)
                bar.update(part.images)
        if normalized and views is not None:
            out /= np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-6)
        return Embedded(out, errors)

    def _rule(
        self, max_tokens: int | None, strategy: Strategy | None
    ) -> tuple[int, Strategy | None]:
        """The budget or the strategy to embed by."""
        if strategy is not None and max_tokens is not None:
            raise ValueError(
                f"max_tokens={max_tokens} has no effect with a strategy, which has its "
                "own limits: leave one of them out"
            )
        own = self.config.data.strategy
        if max_tokens is None:
            return 256, strategy or own
        check_count("max_tokens", max_tokens)
        return max_tokens, (
            own.within(max_tokens) if isinstance(own, NativeStrategy) else None
        )

    @overload
    def features(
        self,
        images: Sequence[ImageLike] | ArrayLike,
        max_tokens: int | None = ...,
        *,
        strategy: None = ...,
        merged: bool = ...,
    ) -> Iterator[np.ndarray]: ...
    @overload
    def features(
        self,
        images: Sequence[ImageLike] | ArrayLike,
        *,
        strategy: Strategy,
        merged: bool = ...,
    ) -> Iterator[list[ViewFeatures]]: ...
    def features(
        self,
        images: Sequence[ImageLike] | ArrayLike,
        max_tokens: int | None = None,
        *,
        strategy: Strategy | None = None,
        merged: bool = False,
    ) -> Iterator[np.ndarray] | Iterator[list[ViewFeatures]]:
        """Yields each image's tokens, in order: float32 `[rows, columns, d]`.

        They are the tower's last tokens, after its final norm if it has one, and packed
        as in `embed_images`. Only a few batches are held at a time, so there may be any
        number of images.

        Args:
          images, max_tokens: as in `embed_images`; raises the same errors.
          strategy: yield for each image a list of its views, in this rule's order, each
            with its tokens. So does a model whose own strategy makes several views,
            if neither is given.
          merged: yield what the tower's language model gets: the tokens after
            `merger`, `[rows / merge, columns / merge, d]`. `merge` is the merger's
            `side`.
        """
        sizes = sizes_of(images)
        found = self.features_source(
            lambda i: Record(images[i]),
            sizes,
            max_tokens,
            strategy=strategy,
            merged=merged,
        )

        def each() -> Iterator[Any]:
            for i, own in enumerate(found):
                if isinstance(own, ValueError | OSError):
                    raise ValueError(
                        f"{image_name(images, i)} cannot be read: {own}"
                    ) from own
                yield own

        return each()

    def features_source(
        self,
        read: Callable[[int], Record],
        sizes: np.ndarray,
        max_tokens: int | None = None,
        *,
        strategy: Strategy | None = None,
        merged: bool = False,
    ) -> Iterator[np.ndarray | list[ViewFeatures] | ValueError | OSError]:
        """Yields what `features` does, but reads images on demand, as `embed_source`.

        In place of an image that cannot be read, or that the strategy refuses, yields
        the error.

        Args:
          read, sizes: as in `embed_source`.
          max_tokens, strategy, merged: as in `features`.
        """
        merger = self.merger if merged else None
        max_tokens, rule = self._rule(max_tokens, strategy)
        if rule is not None:
            views = embed_views.features(
                self.vision, self.config, read, sizes, rule, merger
            )
            if strategy is None and isinstance(rule, NativeStrategy):
                return (x[0].tokens if isinstance(x, list) else x for x in views)
            return views
        return embed_features.by_budget(
            self.vision, self.config, read, sizes, max_tokens, merger
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds captions: float32 `[len, e]`, unit norm, in order.

        Raises:
          TypeError: if `texts` is not a list of texts.
          FileNotFoundError, ValueError: if there is no tokenizer, or it has more ids
            than the model, or if `texts` is one text.
        """
        if isinstance(texts, str):
            raise ValueError(
                f"expected a list of texts, not one text ({texts!r}): pass [text]"
            )
        if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
            raise TypeError(
                f"texts is {texts!r}, but should be a list: pass one such as [text]"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is {text!r}, but should be a str")
        out = np.zeros((len(texts), self.embed_dim), np.float32)
        c = self.text.config
        tokens.check_vocabulary(c.tokenizer, c.vocab_size)
        cut = tokens.share_cut(texts, c.length, c.tokenizer)
        if cut:
            log.warning(
                "%.1f %% of %d texts are longer than the %d tokens that this model "
                "takes, and are truncated",
                100 * cut,
                len(texts),
                c.length,
            )
        at_once = shared_by_devices(min(256, max(len(texts), 1)))
        for start in range(0, len(texts), at_once):
            part = texts[start : start + at_once]
            ids = tokens.encode(
                [*part, *[""] * (at_once - len(part))],
                c.length,
                c.tokenizer,
            )
            vectors = np.asarray(_embed_ids(self.text, self._place(ids)))
            out[start : start + len(part)] = vectors[: len(part)]
        return out

    def logits(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """`[m, e]`, `[len, e]` -> `[m, len]`: exp(scale) * images @ texts.T + bias.

        Raises:
          TypeError: if one of them is not vectors.
        """
        for name, vectors in (("images", images), ("texts", texts)):
            try:
                axes = np.ndim(vectors)
            except ValueError:  # a list of images of several sizes
                axes = 0
            if axes != 2:
                raise TypeError(
                    f"{name} is a {type(vectors).__name__}, but should be vectors "
                    f"[len, {self.embed_dim}]: pass model.embed_{name}({name})"
                )
        if self.model.scale is None or self.model.bias is None:
            raise ValueError("this model was trained without a text tower")
        scale, bias = float(self.model.scale[...]), float(self.model.bias[...])
        return np.exp(scale) * (np.asarray(images) @ np.asarray(texts).T) + bias

    def classify(self, pooled: np.ndarray) -> np.ndarray:
        """Class logits `[m, c]` of pooled vectors `[m, e]`, before normalisation."""
        if self.vision.classifier is None:
            raise ValueError("this model was trained without classes")
        return np.asarray(_classify(self.vision, pooled), np.float32)

    def _place(self, x: Any) -> Any:
        """Splits host arrays over the devices by rows, if the model is on a mesh."""
        spec = self.vision.rules("batch")
        if spec is None:
            return x
        return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))


@jax.jit
def _classify(vision: Vision, pooled: Float[Array, "m e"]) -> Float[Array, "m c"]:
    assert vision.classifier is not None
    return vision.rules.replicate(vision.classifier(pooled))


@jax.jit
def _embed_ids(tower: Text, token_ids: Int[Array, "m t"]) -> Float[Array, "m e"]:
    return tower.rules.replicate(normalize(tower(token_ids)))
