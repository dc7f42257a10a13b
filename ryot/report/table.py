"""A table of columns, for the terminal and for Markdown; what stands in the columns is no matter here."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

Format = Literal["table", "md", "csv", "json"]
WIDTH = 100

Cell = float | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what its header says, what stands in it, and whether it may go when it doesn't vary."""

    name: str
    header: str
    """Lines of the header; the last one is the unit."""
    cells: tuple[Cell, ...]
    decimals: int | None = None
    """None for text and for a number of decimals taken from the values."""
    needed: bool = False
    """Kept even when all rows agree."""
    first: bool = False
    """Belongs into the first block of the terminal's table as long as it fits."""
    right: bool = False
    """Aligned right although the cells are text."""
    status: tuple[str, ...] = ()
    """A word per cell that a page may colour it by: PASS, FAIL, INCONCLUSIVE or GATE."""

    def texts(self) -> list[str]:
        """The cells as text, all with the same number of decimals."""
        numbers = [c for c in self.cells if isinstance(c, (int, float)) and math.isfinite(c)]
        decimals = self.decimals if self.decimals is not None else decimals_for(numbers)
        return [c if isinstance(c, str) else "-" if c is None else f"{c:.{decimals}f}" for c in self.cells]

    def width(self) -> int:
        return max(len(line) for text in (self.header, *self.texts()) for line in text.split("\n"))

    @property
    def is_text(self) -> bool:
        return not self.right and all(isinstance(c, str) or c is None for c in self.cells)


def decimals_for(numbers: Sequence[float]) -> int:
    """Decimals that leave three significant digits to the smallest number above 0; at most 4."""
    smallest = min((abs(n) for n in numbers if n), default=1.0)
    return min(4, max(0, 2 - math.floor(math.log10(smallest))))


def varying_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns worth showing: needed ones, and those in which rows differ; never one without any value.

    Of a single row everything is shown but a ratio to itself.
    """

    def worth(column: Column) -> bool:
        texts = column.texts()
        return column.needed or len(set(texts)) > 1 or (len(texts) == 1 and texts[0] != "1")

    return [c for c in columns if worth(c) and any(v is not None for v in c.cells)] or list(columns)


def constant_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns that `varying_columns` leaves out although they have a value."""
    shown = varying_columns(columns)
    return [c for c in columns if c not in shown and c.cells and c.texts()[0] not in ("-", "1")]


def plain_table(columns: Sequence[Column]) -> str:
    """The terminal's table of these columns; empty for no rows."""
    shown = varying_columns(columns)
    if not shown or not shown[0].cells:
        return ""
    # The header goes in as rows: tabulate would pad every column to its header plus two.
    height = max(c.header.count("\n") for c in shown) + 1
    headers = [c.header.split("\n") for c in shown]
    head = list(zip(*(lines + [""] * (height - len(lines)) for lines in headers)))
    dashes = ["-" * c.width() for c in shown]
    body = list(zip(*(c.texts() for c in shown)))
    return _tabulate([*head, dashes, *body], shown, "plain", headers=())


def markdown_table(columns: Sequence[Column]) -> str:
    """The same as a Markdown table; headers on one line."""
    shown = varying_columns(columns)
    if not shown or not shown[0].cells:
        return ""
    return _tabulate(list(zip(*(c.texts() for c in shown))), shown, "pipe", headers=[one_line(c.header) for c in shown])


def _tabulate(lines: Sequence[Sequence[str]], columns: Sequence[Column], fmt: str, headers: Sequence[str]) -> str:
    text: str = tabulate(
        lines,
        headers=headers,
        tablefmt=fmt,
        disable_numparse=True,
        colalign=["left" if c.is_text else "right" for c in columns],
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def one_line(header: str) -> str:
    """`TTFT (ms)` for a header of two lines."""
    title, _, unit = header.partition("\n")
    return f"{title} ({unit.strip('[]')})" if unit else title


def ratio_text(ratio: float, low: float | None, high: float | None, decimals: int) -> str:
    """`1.52 [1.48, 1.56]`, without the interval where there is none or the ratio is exact."""
    text = f"{ratio:.{decimals}f}"
    return text if low is None or high is None or low == high else f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"


def wrap(text: str, width: int) -> str:
    """The text broken between words so that no line is longer than `width`, where its words allow it."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, subsequent_indent="  ", **options)  # type: ignore[arg-type]
