"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Heads and rows of as many cells each."""
    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])


def line(cells: Iterable[object]) -> str:
    """One row; what would end it or a cell of it is escaped."""
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
