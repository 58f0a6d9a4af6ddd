"""The printed form of a report: a line a layer that fits a terminal, the same words with and without rich."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["LAYERS", "STAGES", "Columns", "Line", "Printable", "cells", "metric_lines", "show", "text"]

STAGES = ("float", "calibrated", "trained")
"""Whose metrics are compared: before quantization, right after calibration, after the last validation."""

_GAP = 2


@dataclass(frozen=True)
class Columns:
    """What a table's columns are, and which give way where it is too wide.

    Attributes:
        names: of all columns.
        kept: how many of the first ones stay; of the others, those without any entry are left out.
        shortest: what columns may shrink to, in the order in which they do: the first at its beginning (the end tells
            modules apart), others at their end.
        right: names of the columns whose entries end in line.
        mark: what the last entry of a line ends with that is to be seen.
    """

    names: tuple[str, ...]
    kept: int
    shortest: Mapping[int, int]
    right: frozenset[str]
    mark: str


LAYERS = Columns(
    ("site", "pattern", "grid", "mac", "bytes", "saturated", ""),
    kept=3,
    shortest={1: 8, 0: 14},  # a grid is never cut
    right=frozenset({"bytes", "saturated"}),
    mark="not exact",
)


class Printable(Protocol):
    """What a table has a line for."""

    def cells(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Line:
    """A layer or an operation.

    Attributes:
        grid: of what it computes with.
        mac: the kind of its products (`reports.cost.product_kind`).
        bytes: of its parameters.
        saturation: share of the worst of its tensors; None where nobody counted.
        exact: whether its float sums are proved to be the integer sums; None where there are none.
    """

    site: str
    pattern: str
    grid: str
    mac: str = ""
    bytes: int | None = None
    saturation: float | None = None
    exact: bool | None = None

    def cells(self) -> tuple[str, ...]:
        return (
            self.site,
            self.pattern,
            self.grid,
            self.mac,
            "" if self.bytes is None else f"{self.bytes:,}",
            "" if self.saturation is None else f"{100 * self.saturation:.2f} %",
            LAYERS.mark if self.exact is False else "",
        )


def cells(lines: Iterable[Printable], width: int | None = None, columns: Columns = LAYERS) -> list[tuple[str, ...]]:
    """Header and rows as text, at most ``width`` columns wide where shortening can do it."""
    rows = [columns.names, *(line.cells() for line in lines)]
    kept = [i for i in range(len(columns.names)) if i < columns.kept or any(row[i] for row in rows[1:])]
    rows = [tuple(row[i] for i in kept) for row in rows]
    for column, shortest in columns.shortest.items():
        excess = sum(_widths(rows)) + _GAP * (len(kept) - 1) - (_columns() if width is None else width)
        if excess > 0:
            limit = max(shortest, _widths(rows)[column] - excess)
            rows = [
                tuple(_short(c, limit, column == 0) if i == column else c for i, c in enumerate(row)) for row in rows
            ]
    return rows


def text(lines: Iterable[Printable], notes: Iterable[str], width: int | None = None, columns: Columns = LAYERS) -> str:
    """Table and notes as plain text."""
    rows = _aligned(cells(lines, width, columns), columns)
    rule = (" " * _GAP).join("-" * w for w in _widths(rows))
    head, *table = [(" " * _GAP).join(row).rstrip() for row in rows]
    return "\n".join([head, rule, *table, "", *_wrapped(notes, width)])


def metric_lines(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """float, calibrated, trained: the user's own validation metrics, one line each, one below the other.

    >>> metrics = {"float": {"acc": 0.975, "loss": 0.1}, "trained": {"acc": 1.0, "loss": 0.25}}
    >>> print(*metric_lines(metrics), sep="\\n")
    float       acc  97.50 %  loss 0.1000
    trained     acc 100.00 %  loss 0.2500
    """
    stages = [stage for stage in STAGES if metrics.get(stage)]
    columns = []
    for name in sorted({name for stage in stages for name in metrics[stage]}):
        values = [metrics[stage].get(name) for stage in stages]
        share = _is_accuracy(name) and all(v is None or 0 <= v <= 1 for v in values)
        shown = ["" if v is None else f"{100 * v:.2f} %" if share else _number(v) for v in values]
        longest = max(map(len, shown))
        columns.append([f"{name if value else '':{len(name)}} {value:>{longest}}" for value in shown])
    return ["  ".join([f"{stage:10}", *(column[i] for column in columns)]).rstrip() for i, stage in enumerate(stages)]


def show(
    lines: Sequence[Printable],
    notes: Sequence[str],
    metrics: Mapping[str, Mapping[str, float]],
    columns: Columns = LAYERS,
) -> None:
    """Print table, notes and metrics; with color where rich is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("", text(lines, notes, columns=columns), "", *metric_lines(metrics), sep="\n")
        return
    console = Console()
    rows = _aligned(cells(lines, console.width, columns), columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, no_wrap=True, overflow="ignore")
    for row in rows[1:]:
        table.add_row(*row, style="yellow" if row[-1].rstrip().endswith(columns.mark) else None)
    console.print()
    console.print(table)
    for line in ("", *_wrapped(notes, console.width), "", *metric_lines(metrics)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _widths(rows: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _aligned(rows: Sequence[tuple[str, ...]], columns: Columns) -> list[tuple[str, ...]]:
    widths, right = _widths(rows), [name in columns.right for name in rows[0]]
    return [tuple(map(_padded, row, widths, right)) for row in rows]


def _padded(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _short(cell: str, limit: int, keep_end: bool) -> str:
    if len(cell) <= limit:
        return cell
    return f"…{cell[1 - limit :]}" if keep_end else f"{cell[: limit - 1]}…"


def _wrapped(notes: Iterable[str], width: int | None) -> list[str]:
    columns = max(40, _columns() if width is None else width)
    return [
        line for note in notes for line in textwrap.wrap(note, columns, subsequent_indent="  ", break_long_words=False)
    ]


def _is_accuracy(name: str) -> bool:
    return re.search(r"[Aa]ccuracy|(?<![A-Za-z])acc(?![a-z])|Acc(?![a-z])", name) is not None


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
