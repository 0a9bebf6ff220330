"""Pictures of plain characters: boxes of bytes, levels on a line. Lists of lines, none wider than asked."""

from __future__ import annotations

from collections.abc import Sequence

SHADES = " ╷│┃█"  # no level in a column, one, two, three or four, more


def boxes(fields: Sequence[tuple[str, int]], width: int, adjoining: bool = True) -> list[str]:
    """Boxes side by side, each with a name and its bytes, as wide as its share of them where there is room.

    Boxes that don't fit into a row go on in the next; those that are not `adjoining` keep a gap.
    """
    labels = [(name, in_bytes(size), size) for name, size in fields]
    rows: list[list[tuple[str, str, int]]] = [[]]
    for label in labels:
        if rows[-1] and _least([*rows[-1], label], adjoining) > width:
            rows.append([])
        rows[-1].append(label)
    return [line for row in rows for line in _row(row, width, adjoining)]


def in_bytes(size: int) -> str:
    return f"{size} byte" if size == 1 else f"{size} bytes"


def _inner(label: tuple[str, str, int]) -> int:
    return max(len(label[0]), len(label[1])) + 2


def _least(row: list[tuple[str, str, int]], adjoining: bool) -> int:
    edges = len(row) + 1 if adjoining else 3 * len(row) - 1
    return sum(map(_inner, row)) + edges


def _row(row: list[tuple[str, str, int]], width: int, adjoining: bool) -> list[str]:
    spare, total = max(0, width - _least(row, adjoining)), sum(size for *_, size in row)
    inner = [_inner(label) + spare * label[2] // max(1, total) for label in row]
    lines = []
    for left, fill, between, right, texts in (("┌", "─", "┬", "┐", None), ("│", " ", "│", "│", 0),
                                              ("│", " ", "│", "│", 1), ("└", "─", "┴", "┘", None)):
        parts = [fill * n if texts is None else f" {label[texts]}".ljust(n)
                 for label, n in zip(row, inner, strict=True)]
        join = between if adjoining else f"{right} {left}"
        lines.append(left + join.join(parts) + right)
    return lines


def line(levels: Sequence[float], width: int) -> list[str]:
    """Levels from -1 to 1 above an axis; a mark is darker where several share its place."""
    counts = [0] * width
    for x in levels:
        counts[round((x + 1) / 2 * (width - 1))] += 1
    marks = "".join(SHADES[0 if not n else 1 if n == 1 else 2 if n == 2 else 3 if n < 5 else 4] for n in counts)
    axis = ["─"] * width
    labels = [" "] * width
    for place, label in ((0, "-1"), (0.25, "-0.5"), (0.5, "0"), (0.75, "0.5"), (1, "1")):
        at = round(place * (width - 1))
        axis[at] = "┴"
        start = min(max(0, at - len(label) // 2), width - len(label))
        labels[start:start + len(label)] = label
    return [marks.rstrip(), "".join(axis), "".join(labels).rstrip()]
