"""How many of the things that a dataset names may be missing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

log = logging.getLogger("navit")

_NAMED = 3


def check_missing(
    missing: Sequence[str], count: int, share: float, what: str, remedy: str
) -> None:
    """Counts and names what is left out because it is missing.

    Args:
      missing: the names of what is missing.
      count: how many there would be in all.
      share: this share of them may be missing.
      what: what they are, such as "files of captions.csv".

    Raises:
      ValueError: if more are missing.
    """
    if not missing:
        return
    first = ", ".join(map(repr, missing[:_NAMED]))
    more = ", ..." if len(missing) > _NAMED else ""
    found = f"{len(missing)} of {count} {what} are missing: {first}{more}"
    if len(missing) / count <= share:
        log.warning("left out: %s", found)
        return
    enough = math.ceil(1e4 * len(missing) / count) / 1e4
    raise ValueError(
        f"{found}; {remedy}, or set missing={enough:g} to go on without them "
        f"(data.train.missing or data.eval.missing; it is {share:g})"
    )
