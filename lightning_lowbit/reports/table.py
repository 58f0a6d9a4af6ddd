"""The printed form of a report: a line a layer that fits a terminal, the same words with and without rich."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "LAYERS", "STAGES", "Columns", "Line", "Printable", "cells", "metric_lines", "setbacks", "show", "text",
    "wrapped",
]  # fmt: skip

STAGES = ("float", "calibrated", "trained")
"""Whose metrics are compared: before quantization, right after calibration, after the last validation."""

_GAP = 2
_SETBACK = 0.02  # of an accuracy between calibration and the end of training that is said


@dataclass(frozen=True)
class Columns:
    """What a table's columns are, and which give way where it is too wide.

    Attributes:
        names: of all columns.
        kept: how many of the first ones stay without any entry, which leaves others out.
        shortest: what columns of names may shrink to, in the order in which they do; nothing else is ever cut. Entries
            of the first one stay distinct, whatever width that takes.
        right: names of the columns whose entries end in line.
        mark: what the last entry of a line ends with that is to be seen.
        least: columns that go to the notes where shortening does not do, in that order, with a heading there.
        begins: whether the first column keeps its beginnings; the ends tell modules apart.
    """

    names: tuple[str, ...]
    kept: int
    shortest: Mapping[int, int]
    right: frozenset[str]
    mark: str
    least: Mapping[str, str] = field(default_factory=dict)
    begins: bool = False


LAYERS = Columns(
    ("site", "pattern", "grid", "mac", "bytes", "saturated", ""),
    kept=3,
    shortest={1: 8, 0: 14},
    right=frozenset({"bytes", "saturated"}),
    mark="not exact",
    least={"pattern": "pattern", "": "", "mac": "mac", "bytes": "bytes", "saturated": "saturated"},
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
    """Header and rows as text, at most ``width`` columns wide where names can be shortened and columns left out."""
    return _fitted([line.cells() for line in lines], width, columns)[0]


def text(lines: Iterable[Printable], notes: Iterable[str], width: int | None = None, columns: Columns = LAYERS) -> str:
    """Table and notes as plain text."""
    rows, moved = _fitted([line.cells() for line in lines], width, columns)
    head, *table = _aligned(rows, columns)
    rule = (" " * _GAP).join("-" * w for w in _widths(rows))
    below = wrapped([*moved, *notes], width)
    return "\n".join([head, rule, *table, *([""] if below else []), *below])


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
        from rich import console
    except ImportError:
        print("", text(lines, notes, columns=columns), *(["", *metric_lines(metrics)] if metrics else []), sep="\n")
        return
    screen = console.Console()
    given = [line.cells() for line in lines]
    rows, moved = _fitted(given, screen.width, columns)
    head, *table = _aligned(rows, columns)
    # Not rich's table: it cuts what is wider than the terminal, figures too, and leaves no sign.
    styled = [("", None), (head, "bold"), ("─" * _total(rows), None)]
    styled += [
        (line, "yellow" if row[-1].endswith(columns.mark) else None) for line, row in zip(table, given, strict=True)
    ]
    below = wrapped([*moved, *notes], screen.width)
    plain = [*([""] if below else []), *below, *(["", *metric_lines(metrics)] if metrics else [])]
    for line, style in [*styled, *((line, None) for line in plain)]:
        screen.print(line, style=style, highlight=False, soft_wrap=True, markup=False)


def setbacks(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What to say where training lost accuracy that the calibrated network has: a sentence a metric.

    Args:
        metrics: by stage, as fractions of 1 or in percent.

    >>> setbacks({"calibrated": {"acc": 0.96, "loss": 0.1}, "trained": {"acc": 0.95, "loss": 1.0}})
    []
    >>> setbacks({"calibrated": {"acc": 0.96}, "trained": {"acc": 0.16}})[0].partition(". ")[0]
    'acc: trained is 80.00 points below calibrated'
    """
    calibrated, trained = metrics.get("calibrated", {}), metrics.get("trained", {})
    found = []
    for name in sorted(calibrated.keys() & trained.keys()):
        unit = 1 if max(calibrated[name], trained[name]) <= 1 else 100
        lost = (calibrated[name] - trained[name]) / unit
        if _is_accuracy(name) and lost > _SETBACK:
            found.append(
                f"{name}: trained is {100 * lost:.2f} points below calibrated. Lower the learning rate (a tenth of the "
                "float one or less), freeze batch norms later (freeze_batch_norm), or keep the calibrated network. The "
                "order of steps: docs/fine_tuning.md, 9"
            )
    return found


def wrapped(notes: Iterable[str], width: int | None = None) -> list[str]:
    """Lines of at most ``width`` columns, the terminal's without; what goes on is indented."""
    columns = max(40, _columns() if width is None else width)
    return [
        line for note in notes for line in textwrap.wrap(note, columns, subsequent_indent="  ", break_long_words=False)
    ]


def _fitted(
    given: Sequence[tuple[str, ...]], width: int | None, columns: Columns
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Header and rows that fit, and notes of what had no room."""
    width = _columns() if width is None else width
    kept = [i for i in range(len(columns.names)) if i < columns.kept or any(row[i] for row in given)]
    least = [columns.names.index(name) for name in columns.least]
    gone: list[int] = []
    while True:
        rows = _shrunk([columns.names, *given], kept, width, columns)
        going = next((i for i in least if i in kept), None)
        if going is None or _total(rows) <= width:
            return rows, [note for i in gone for note in _moved(given, i, columns)]
        kept.remove(going)
        gone.append(going)


def _shrunk(
    rows: Sequence[tuple[str, ...]], kept: Sequence[int], width: int, columns: Columns
) -> list[tuple[str, ...]]:
    """The kept columns, those of names as short as they must be."""
    table = [[row[i] for i in kept] for row in rows]
    for column, shortest in columns.shortest.items():
        excess = _total(table) - width
        if column not in kept or excess <= 0:
            continue
        place = kept.index(column)
        names = [row[place] for row in table]
        limit = max(shortest, max(map(len, names)) - excess)
        short = _distinct(names, limit, columns.begins) if column == 0 else [_begin(name, limit) for name in names]
        for row, name in zip(table, short, strict=True):
            row[place] = name
    return [tuple(row) for row in table]


def _distinct(names: Sequence[str], limit: int, begins: bool) -> list[str]:
    """Names of at most ``limit`` characters, or of as many as keep different names different."""
    cuts: tuple[Callable[[str, int], str], ...] = (_begin if begins else _end, _both)
    for longer in range(limit, max(map(len, names))):
        for cut in cuts:
            short = [cut(name, longer) for name in names]
            if len(set(short)) == len(set(names)):
                return short
    return list(names)


def _begin(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _end(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def _both(name: str, limit: int) -> str:
    front = limit // 2
    return name if len(name) <= limit else f"{name[:front]}…{name[front + 1 - limit :]}"


def _moved(given: Sequence[tuple[str, ...]], column: int, columns: Columns) -> list[str]:
    """A column as a note: each of its entries with the rows that have it."""
    rows: dict[str, list[str]] = {}
    for row in given:
        if row[column]:
            rows.setdefault(row[column], []).append(row[0])
    heading = columns.least[columns.names[column]]
    return ["; ".join(f"{heading} {entry}: {', '.join(names)}".lstrip() for entry, names in rows.items())]


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _total(rows: Sequence[Sequence[str]]) -> int:
    return sum(_widths(rows)) + _GAP * (len(rows[0]) - 1)


def _aligned(rows: Sequence[tuple[str, ...]], columns: Columns) -> list[str]:
    """A line a row, its entries below one another."""
    widths, right = _widths(rows), [name in columns.right for name in rows[0]]
    return [(" " * _GAP).join(map(_padded, row, widths, right)).rstrip() for row in rows]


def _padded(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _is_accuracy(name: str) -> bool:
    return re.search(r"[Aa]ccuracy|(?<![A-Za-z])acc(?![a-z])|Acc(?![a-z])", name) is not None


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
