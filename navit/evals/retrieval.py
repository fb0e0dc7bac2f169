"""Retrieval: recall@1 from image to text and from text to image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np


class Retrieval:
    """Recall@1 among all images and all distinct captions of a source.

    An image may have several captions and a caption several images; any right one
    counts.

    Args:
      embed_texts: captions -> unit vectors `[len, e]`.
      captions: the captions of each image.
    """

    def __init__(
        self,
        embed_texts: Callable[[Sequence[str]], np.ndarray],
        captions: Sequence[Sequence[str]],
    ) -> None:
        texts = list(dict.fromkeys(c for own in captions for c in own))
        place = {caption: i for i, caption in enumerate(texts)}
        self._right = np.zeros((len(captions), len(texts)), bool)
        for image, own in enumerate(captions):
            self._right[image, [place[c] for c in own]] = True
        self._texts = embed_texts(texts)

    @property
    def chance(self) -> dict[str, float]:
        """Recall of guessing, by metric name."""
        share = float(self._right.mean())
        return {"image_to_text_r1": share, "text_to_image_r1": share}

    def run(self, images: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, recall) for image embeddings `[len(captions), e]`.

        A row of NaN is an image that could not be read; it does not count, nor do
        captions that belong only to such images.
        """
        readable = ~np.isnan(images[:, 0])
        right = self._right[readable]
        asked = right.any(0)
        if not readable.any():
            return
        right = right[:, asked]
        scores = images[readable] @ self._texts[asked].T
        hit = np.take_along_axis(right, scores.argmax(1)[:, None], 1)
        yield "image_to_text_r1", float(hit.mean())
        hit = np.take_along_axis(right, scores.argmax(0)[None], 0)
        yield "text_to_image_r1", float(hit.mean())
