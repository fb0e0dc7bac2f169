"""Results as tables: for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from navit.evals.notes import Page
from navit.evals.row import Row, label, origin, step

Line = tuple[str, ...]

_COLUMNS = ("set", "kind", "tokens", "used", "enlarged", "images", "GFLOPs", "images/s")
# A cascade has a point for every 5 % of the images; the tables show every fifth point.
_EVERY = 5
# How many classes the terminal names, of those that were measured one by one.
_WORST = 5


def text(rows: Sequence[Row], cascades: Sequence[Row]) -> str:
    """The results for a terminal."""
    blocks = [
        _aligned([(*_COLUMNS, *_titles(some)), *_lines(some, brief=True)])
        for some in _kinds(rows)
    ]
    if cascades:
        blocks.append(_aligned(_cascade_lines(cascades)))
    lines = [_worst(row) for row in rows if row.get("per_class")]
    lines += dict.fromkeys(f"note: {note}" for row in rows for note in row["notes"])
    return "\n".join(["\n\n".join(blocks), *lines])


def markdown(
    rows: Sequence[Row], cascades: Sequence[Row], pages: Sequence[Page]
) -> str:
    """The results as Markdown."""
    before = (*_COLUMNS[:2], "data", "weights", "step", *_COLUMNS[2:])
    blocks = ["# Results by token budget"]
    for some in _kinds(rows):
        header = (*before, *_titles(some), "notes", "date")
        blocks.append(_piped([header, *_lines(some, brief=False)]))
    if cascades:
        header, *lines = _cascade_lines(cascades)
        more = [("data", "weights", "step"), *map(_whence, cascades)]
        lines = [
            (x[0], *y, *x[1:]) for x, y in zip([header, *lines], more, strict=True)
        ]
        blocks.append(_piped(lines))
    if pages:
        blocks += ["What a page becomes:", _piped(_page_lines(pages))]
    return "\n\n".join(blocks) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The results as CSV, a line for each row."""
    flat = []
    for row in rows:
        line = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        line |= row["metrics"]
        for name in ("chance", "measured"):
            line |= {f"{name}_{k}": v for k, v in row.get(name, {}).items()}
        flat.append({**line, "notes": "; ".join(row["notes"])})
    columns = dict.fromkeys(name for line in flat for name in line)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _kinds(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table: those of retrieval have other metrics than the rest."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        kind = row["kind"] if row["kind"] in ("retrieval", "all") else "classes"
        tables.setdefault(kind, []).append(row)
    return [*tables.values()]


def _metrics(rows: Sequence[Row]) -> list[str]:
    """The metrics of a table, in the order of the row that has the most."""
    most_first = sorted(rows, key=lambda row: -len(row["metrics"]))
    return [*dict.fromkeys(name for row in most_first for name in row["metrics"])]


def _titles(rows: Sequence[Row]) -> list[str]:
    """The metrics' labels; "image→text" is in the first of its recalls only."""
    titles, direction = [], ""
    for name in map(label, _metrics(rows)):
        first, _, rest = name.partition(" ")
        titles.append(rest if rest and first == direction else name)
        direction = first
    return titles


def _lines(rows: Sequence[Row], *, brief: bool) -> list[Line]:
    """A line for each row, and one for chance after those that share it."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        chance = tuple(row["chance"].items())
        groups.setdefault((row["set"], row["kind"], origin(row), chance), []).append(
            row
        )
    names, lines = _metrics(rows), []
    for (title, kind, _, chance), some in groups.items():
        for row in some:
            values = (_value(name, row["metrics"].get(name)) for name in names)
            before, ends = ((), ()) if brief else (_whence(row), _ends(row))
            lines.append((title, kind, *before, *_cells(row), *values, *ends))
        if chance:
            values = (_value(name, dict(chance).get(name), "") for name in names)
            before, ends = ((), ()) if brief else (("", "", ""), ("", ""))
            blank = [""] * (len(_COLUMNS) - 3)
            lines.append((title, kind, *before, "chance", *blank, *values, *ends))
    return lines


def _value(metric: str, value: float | None, missing: str = "-") -> str:
    if value is None:
        return missing
    return f"{value:.3f}" if metric == "calibration_error" else f"{value:.1%}"


def _cells(row: Row) -> Line:
    """The cells of `_COLUMNS`, without the set and the kind."""
    flops, enlarged = row.get("flops_per_image"), row.get("enlarged")
    speed = row["images_per_second"]
    return (
        str(row["budget"]),
        f"{row['tokens_per_image']:.1f}",
        "-" if enlarged is None else f"{enlarged:.0%}",
        _images(row),
        "-" if flops is None else f"{flops / 1e9:.3g}",
        "-" if speed is None else f"{speed:.1f}",
    )


def _images(row: Row) -> str:
    """How many images count, of how many; and how many texts are asked for images."""
    cell, lost = str(row["images"]), row["unreadable"]
    if "measured" in row:  # not in tables of earlier versions
        measured = dict(row["measured"])
        texts = measured.get("text_to_image_r1")
        counted = next(iter(measured.values()), 0)  # the first metric is of images
        cell = cell if counted == row["images"] else f"{counted} of {cell}"
        cell += "" if texts is None else f", {texts} texts"
    return cell + (f" ({lost} unreadable)" if lost else "")


def _whence(row: Row) -> Line:
    """The data, the weights and the step of a row."""
    return origin(row), row.get("model", "-"), step(row)


def _ends(row: Row) -> Line:
    return "; ".join(row["notes"]), row["date"]


def _worst(row: Row) -> str:
    """The classes with the lowest accuracy."""
    classes = sorted(row["per_class"].items(), key=lambda x: x[1]["accuracy"])[:_WORST]
    named = ", ".join(
        f"{name} {x['accuracy']:.1%} of {x['images']}" for name, x in classes
    )
    return f"lowest of {row['set']} at {row['budget']} tokens: {named}"


def _cascade_lines(cascades: Sequence[Row]) -> list[Line]:
    """Accuracy (and GFLOPs an image) by the share that is sent to the larger budget."""
    shares = [f"{i / 20:.0%} sent" for i in range(0, 21, _EVERY)]
    lines: list[Line] = [("cascade", "tokens", *shares)]
    for cascade in cascades:
        points = [
            f"{accuracy:.1%} ({flops / 1e9:.3g})"
            for _, accuracy, flops in cascade["points"][::_EVERY]
        ]
        budgets = f"{cascade['small']}→{cascade['large']}"
        lines.append((f"{cascade['set']}, {cascade['kind']}", budgets, *points))
    return lines


def _page_lines(pages: Sequence[Page]) -> list[Line]:
    header = ("page", "tokens", "grid", "pixels (height x width)", "effective dpi")
    return [
        header,
        *(
            (
                f"{page.name}",
                f"{page.budget}",
                f"{page.grid[0]}x{page.grid[1]}",
                f"{page.pixels[0]}x{page.pixels[1]}",
                f"{page.dpi}",
            )
            for page in pages
        ),
    ]


def _aligned(lines: Sequence[Line]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _piped(lines: Sequence[Line]) -> str:
    header, *rest = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rest))
