"""Retrieval: recall@1, 5 and 10 from image to text and from text to image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from navit.evals.metric import Metric
from navit.evals.nearest import nearest

log = logging.getLogger("navit")

_KS = (1, 5, 10)


class Retrieval:
    """Recall@k among all images and all distinct captions of a source.

    An image may have several captions and a caption several images; any right one
    counts. An image without a caption is not asked for one, but is among the images
    that the captions are asked for. Where there are at most k candidates, recall@k is 1
    and is left out, except for k = 1.

    Args:
      embed_texts: captions -> unit vectors `[len, e]`.
      captions: the captions of each image.

    Raises:
      ValueError: if no image has a caption.
    """

    def __init__(
        self,
        embed_texts: Callable[[Sequence[str]], np.ndarray],
        captions: Sequence[Sequence[str]],
    ) -> None:
        texts = list(dict.fromkeys(c for own in captions for c in own))
        if not texts:
            raise ValueError(
                f"none of the {len(captions)} images has a caption: retrieval needs "
                "data with captions"
            )
        bare = sum(not own for own in captions)
        if bare:
            log.warning(
                "%d of %d images have no caption: only text is retrieved against them",
                bare,
                len(captions),
            )
        place = {caption: i for i, caption in enumerate(texts)}
        self._pairs = np.array(
            [
                (i, place[c])
                for i, own in enumerate(captions)
                for c in dict.fromkeys(own)
            ]
        )
        self._texts = embed_texts(texts)

    def run(self, images: np.ndarray) -> Iterator[Metric]:
        """Yields recalls of image embeddings `[len(captions), e]`, both ways.

        A row of NaN is an image that could not be read; it does not count, nor do
        captions that belong only to such images.
        """
        readable, asked, pairs = self._counted(images)
        if not len(pairs):
            return
        images, texts = images[readable], self._texts[asked]
        for direction, queries, candidates, right in (
            ("image_to_text", images, texts, pairs),
            ("text_to_image", texts, images, pairs[:, ::-1]),
        ):
            count = len(candidates)
            ks = [k for k in _KS if k == 1 or k < count]
            found = recall(queries, candidates, right, ks=ks)
            guessed = chance(right, count, ks=ks)
            asked_of = len(np.unique(right[:, 0]))
            for k in ks:
                yield Metric(f"{direction}_r{k}", found[k], asked_of, guessed[k])

    def _counted(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The candidates for embeddings `[len(captions), e]`.

        Returns:
          which images are readable, `[len(captions)]`; the texts with a readable image;
          and the right pairs `[pairs, 2]` (image, text), counted among these.
        """
        readable = ~np.isnan(images[:, 0])
        pairs = self._pairs[readable[self._pairs[:, 0]]]
        asked, text = np.unique(pairs[:, 1], return_inverse=True)
        image = (np.cumsum(readable) - 1)[pairs[:, 0]]
        return readable, asked, np.stack((image, text), -1)


def recall(
    queries: np.ndarray,
    candidates: np.ndarray,
    pairs: np.ndarray,
    *,
    ks: Sequence[int] = _KS,
) -> dict[int, float]:
    """The share of queries that have a right candidate among their k nearest, by k.

    Exact, without a matrix of all scores. Among equal candidates, the one with the
    lower index is the nearer.

    Args:
      queries: vectors `[m, e]`.
      candidates: vectors `[c, e]`, at least max(ks).
      pairs: the right pairs `[pairs, 2]` (query, candidate). A query without one does
        not count.
    """
    asked, query = np.unique(pairs[:, 0], return_inverse=True)
    _, index = nearest(queries[asked], candidates, k=max(ks))
    count = len(candidates)
    places = np.arange(len(asked))[:, None] * count + index
    right = np.isin(places, query * count + pairs[:, 1])
    return {k: float(right[:, :k].any(1).mean()) for k in ks}


def chance(
    pairs: np.ndarray, candidates: int, *, ks: Sequence[int] = _KS
) -> dict[int, float]:
    """Recall of k random candidates, drawn without replacement, by k.

    With r right ones among n candidates, 1 - C(n - r, k) / C(n, k), the mean over the
    queries.

    Args:
      pairs: the right pairs `[pairs, 2]` (query, candidate), each once.
      candidates: n, at least max(ks).
    """
    right = np.unique(pairs[:, 0], return_counts=True)[1]
    missed = [
        (candidates - right - i).clip(0) / (candidates - i) for i in range(max(ks))
    ]
    return {k: float(1 - np.prod(missed[:k], 0).mean()) for k in ks}
