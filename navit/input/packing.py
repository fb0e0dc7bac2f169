"""Lengths -> rows: streaming best fit. Knows nothing of images or pixels."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(
    lengths: Sequence[int],
    row_tokens: int,
    *,
    open_rows: int = 16,
    max_images: int | None = None,
) -> list[list[int]]:
    """Packs `lengths` in order into rows; returns the indices in each row.

    Each length goes to the open row with the least room that still holds it. When none
    does and `open_rows` are open, only the fullest is closed, so the others keep
    waiting for what fits them: as good as grain's best fit with 256 bins, with 16.

    A row is closed at once when it is full or has `max_images`. The rows still open at
    the end come last, fullest first.

    Raises:
      ValueError: if a length is not between 1 and `row_tokens`.
    """
    # Open rows by their room. Bit r of `rooms` says that some open row has room r, so
    # the tightest fit of a length is the lowest set bit at or above it.
    by_room: dict[int, list[list[int]]] = {}
    rooms = 0
    num_open = 0
    closed = []

    def take(room: int) -> list[int]:
        nonlocal rooms
        row = by_room[room].pop()
        if not by_room[room]:
            rooms &= ~(1 << room)
        return row

    for index, length in enumerate(lengths):
        if not 0 < length <= row_tokens:
            raise ValueError(
                f"image {index} has {length} tokens, and a row holds 1 to {row_tokens}"
            )
        if fitting := rooms >> length:
            room = _lowest_bit(fitting) + length
            row = take(room)
        else:
            if num_open == open_rows:
                closed.append(take(_lowest_bit(rooms)))
                num_open -= 1
            room, row = row_tokens, []
            num_open += 1
        row.append(index)
        room -= length
        if room == 0 or len(row) == max_images:
            closed.append(row)
            num_open -= 1
        else:
            by_room.setdefault(room, []).append(row)
            rooms |= 1 << room
    return closed + [row for room in sorted(by_room) for row in by_room[room]]


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
