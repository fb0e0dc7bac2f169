"""Limits how much of what a dataset names may be missing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

log = logging.getLogger("navit")

_NAMED = 3


def check_missing(
    missing: Sequence[str], count: int, share: float, what: str, remedy: str
) -> None:
    """Warns about missing items, which are left out, with their number and some names.

    Args:
      missing: the names of the missing items.
      count: the number of items, missing or not.
      share: the share of items that may be missing.
      what: what the items are, such as "files of captions.csv".
      remedy: what to do about it, for the error.

    Raises:
      ValueError: if more are missing.
    """
    if not missing:
        return
    first = ", ".join(map(repr, missing[:_NAMED]))
    more = ", ..." if len(missing) > _NAMED else ""
    message = f"{len(missing)} of {count} {what} are missing: {first}{more}"
    if len(missing) / count <= share:
        log.warning("left out: %s", message)
        return
    # To one digit, as the next check may find a little more.
    exact = len(missing) / count
    unit = 10.0 ** math.floor(math.log10(exact))
    enough = math.ceil(exact / unit) * unit
    raise ValueError(
        f"{message}; {remedy}, or set missing={enough:g} to continue without them "
        f"(data.train.missing or data.eval.missing; it is {share:g})"
    )
