"""What a strategy makes of one image size, in numbers: its cost, detail and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from navit.plan.strategies import Strategy, View


@runtime_checkable
class Tower(Protocol):
    """The sizes of an encoder, as in `navit.config.VisionConfig`."""

    @property
    def width(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def mlp_dim(self) -> int: ...


class Measures(NamedTuple):
    """A strategy on one image.

    "Main views" are the tiles, or the one view of an image without tiles.

    Attributes:
      views: what the encoder sees.
      encoder_tokens: patches of all views.
      tokens: what the language model gets, separators included.
      flops: of one encoder's forward pass over the views, each on its own.
      scale: pixels of the encoder per pixel of the image, in the direction in which
        there are fewer. Above 1 the image is enlarged, which shows no more.
      kept: share of the image's pixels that the main views keep.
      distortion: by how much the image is stretched in width against its height.
      padding: share of the encoder's pixels that are filler.
      thumbnail: share of the encoder's pixels in thumbnails.
      cut: the chance that a cut of the main views crosses an object that lies anywhere
        in the image with equal chance.
    """

    views: tuple[View, ...]
    encoder_tokens: int
    tokens: int
    flops: int
    scale: float
    kept: float
    distortion: float
    padding: float
    thumbnail: float
    cut: float


def measure(
    strategy: Strategy,
    height: int,
    width: int,
    *,
    tower: Tower,
    images: int = 1,
    object_size: tuple[int, int] = (64, 64),
) -> Measures:
    """Measures a strategy on an image.

    Args:
      tower: the encoder whose operations are counted, at the strategy's patch size.
      images: how many images the request has.
      object_size: (height, width) of the object for `cut`, in pixels of the image.

    Raises:
      ValueError: for a size that the strategy refuses.
    """
    views = strategy.views(height, width, images=images)
    mains = main_views(views)
    counts = [view.grid[0] * view.grid[1] for view in views]
    areas = [_area(view.window) for view in views]
    high, wide = scales_of(mains[0])
    kept = sum(map(_shown, mains)) * min(1.0, 1 / (high * wide)) / (height * width)
    whole = 1.0
    for axis in (0, 1):
        cuts = cuts_of(views, height, width)[axis]
        whole *= 1 - _chance(cuts, (height, width)[axis], object_size[axis])
    return Measures(
        views=views,
        encoder_tokens=sum(counts),
        tokens=strategy.tokens(height, width, images=images),
        flops=_flops(counts, strategy.patch, tower),
        scale=min(high, wide),
        kept=min(1.0, kept),
        distortion=wide / high,
        padding=1 - sum(map(_shown, views)) / sum(areas),
        thumbnail=sum(
            area
            for view, area in zip(views, areas, strict=True)
            if view.role == "thumbnail"
        )
        / sum(areas),
        cut=1 - whole,
    )


def main_views(views: Sequence[View]) -> tuple[View, ...]:
    """The tiles, or the one view of an image that has no tiles."""
    return tuple(v for v in views if v.role != "thumbnail") or tuple(views)


def cuts_of(
    views: Sequence[View], height: int, width: int
) -> tuple[list[float], list[float]]:
    """Where main views begin or end inside the image: (from the top, from the left)."""
    found: tuple[set[float], set[float]] = (set(), set())
    for view in main_views(views):
        seen, scales = view.content, scales_of(view)
        for axis, side in ((0, height), (1, width)):
            for edge in (seen[axis], seen[axis + 2]):
                place = view.box[axis] + edge / scales[axis]
                # A float edge of the image is no cut.
                if 1e-6 < place < side - 1e-6:
                    found[axis].add(round(place, 6))
    return sorted(found[0]), sorted(found[1])


def scales_of(view: View) -> tuple[float, float]:
    """Pixels that the encoder sees per pixel of the image: (vertical, horizontal)."""
    top, left, bottom, right = view.box
    return view.size[0] / (bottom - top), view.size[1] / (right - left)


def _area(box: Sequence[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shown(view: View) -> int:
    """Pixels of a view that show the image."""
    return _area(view.content)


def _chance(cuts: Sequence[float], side: int, length: int) -> float:
    """The chance that a stretch of this length inside a side has a cut in it."""
    room = side - length
    if room <= 0:
        return float(bool(cuts))
    crossed, end = 0.0, 0.0
    for cut in cuts:  # the stretch may begin from `length` before a cut up to the cut
        start = max(end, cut - length)
        end = max(end, min(cut, room))
        crossed += max(0.0, end - start)
    return crossed / room


def _flops(counts: Sequence[int], patch: int, tower: Tower) -> int:
    """Each view of n tokens costs n² in attention, as in `navit.model.flops`."""
    d, layers = tower.width, tower.depth
    token = 6 * patch**2 * d + layers * (8 * d**2 + 4 * d * tower.mlp_dim)
    return sum(counts) * token + 4 * layers * d * sum(n * n for n in counts)
