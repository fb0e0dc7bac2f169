"""Which strategy each kind of request should take within a budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from navit.plan.strategies import QwenVL, Strategy
from navit.plan.strategies.measures import Tower, measure


class Request(NamedTuple):
    """Equal requests of a workload.

    Attributes:
      kind: requests of a kind take the same strategy.
      number: how many there are.
      scale: the least scale of each image at which its text can be read.
      images: images of a request; some strategies give each fewer tiles then.
      frames: frames of a request that is a video; each costs what an image costs, and
        of `QwenVL` each `temporal_patch` of them.
      limit: the most tokens of a request; None sets no limit.
    """

    kind: str
    height: int
    width: int
    number: int = 1
    scale: float = 0.0
    images: int = 1
    frames: int = 1
    limit: int | None = None


class Offer(NamedTuple):
    """What a strategy costs and gives for all requests of a kind.

    Attributes:
      tokens: of the language model.
      detail: the sum over requests of their scale, which counts as 1 if it is above.
    """

    strategy: Strategy
    tokens: int
    detail: float
    encoder_tokens: int
    flops: int


class Offers(NamedTuple):
    """The strategies for a kind: those that will do, and why the others will not."""

    usable: list[Offer]
    refused: list[tuple[Strategy, str]]


def offers(
    requests: Sequence[Request], strategies: Sequence[Strategy], *, tower: Tower
) -> Offers:
    """Measures strategies on the requests of one kind."""
    found = Offers([], [])
    for strategy in strategies:
        try:
            found.usable.append(_offer(requests, strategy, tower))
        except ValueError as error:
            found.refused.append((strategy, str(error)))
    return found


def _offer(requests: Sequence[Request], strategy: Strategy, tower: Tower) -> Offer:
    tokens = encoder_tokens = flops = 0
    detail = 0.0
    for r in requests:
        found = measure(strategy, r.height, r.width, tower=tower, images=r.images)
        if found.scale < r.scale:
            raise ValueError(
                f"{r.width}x{r.height} (width x height) gets a scale of "
                f"{found.scale:.2f}, below {r.scale:.2f}"
            )
        together = strategy.temporal_patch if isinstance(strategy, QwenVL) else 1
        shown = r.images * -(-r.frames // together)
        if r.limit is not None and found.tokens * shown > r.limit:
            raise ValueError(
                f"{r.width}x{r.height} (width x height) takes {found.tokens * shown} "
                f"tokens, above its limit of {r.limit}"
            )
        tokens += r.number * shown * found.tokens
        encoder_tokens += r.number * shown * found.encoder_tokens
        flops += r.number * shown * found.flops
        detail += r.number * min(1.0, found.scale)
    return Offer(strategy, tokens, detail, encoder_tokens, flops)


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """The cheapest offer, and the upgrades whose detail per extra token only falls.

    Of offers with equal tokens and detail, the one with fewer FLOPs is taken.
    """
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda x: (x.tokens, -x.detail, x.flops)):
        if kept and offer.detail <= kept[-1].detail:
            continue
        while len(kept) > 1 and _rate(kept[-2], offer) > _rate(kept[-2], kept[-1]):
            kept.pop()
        kept.append(offer)
    return kept


def choose(hulls: Mapping[str, Sequence[Offer]], tokens: int) -> dict[str, Offer]:
    """One offer of each kind's hull, with at most this many tokens in all.

    Begins with the cheapest of each kind, and takes the upgrade of most detail per
    extra token (of equals, the one with fewer extra FLOPs) until none fits; one that
    does not fit is passed over. If the first upgrade that does not fit finds the budget
    spent, no other choice has more detail. Otherwise another may have more, but by less
    than that upgrade would add.

    Raises:
      ValueError: if even the cheapest offers exceed the budget.
    """
    if (needed := least(hulls)) > tokens:
        cheapest = ", ".join(f"{k} {x[0].tokens:,}" for k, x in hulls.items())
        raise ValueError(
            f"{tokens:,} tokens are too few: this workload takes at least {needed:,} "
            f"({cheapest}); allow them, or lower counts, frames or least scales"
        )
    place = dict.fromkeys(hulls, 0)
    left = tokens - needed
    while True:
        steps = []
        for kind, at in place.items():
            now, *after = hulls[kind][at : at + 2]
            if after and after[0].tokens - now.tokens <= left:
                more = after[0].flops - now.flops
                steps.append((-_rate(now, after[0]), more, kind))
        if not steps:
            return {kind: hulls[kind][at] for kind, at in place.items()}
        kind = min(steps)[2]
        left += hulls[kind][place[kind]].tokens
        left -= hulls[kind][place[kind] + 1].tokens
        place[kind] += 1


def least(hulls: Mapping[str, Sequence[Offer]]) -> int:
    """The tokens of the cheapest offers."""
    return sum(offers[0].tokens for offers in hulls.values())


def _rate(now: Offer, after: Offer) -> float:
    """Detail per extra token of an upgrade, which always takes more tokens."""
    return (after.detail - now.detail) / (after.tokens - now.tokens)
