"""``html_report``: what is known of a low-bit network on one page that stands alone and can be mailed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.program import write_atomically
from lightning_lowbit.modules.base import LowBitModule, Tally, low_bit_modules
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.reports import page
from lightning_lowbit.reports.histograms import activation_histograms, rounding_activations, weight_histograms
from lightning_lowbit.reports.plots import (
    Log,
    Point,
    accuracy_against_size,
    exponent_traces,
    heights,
    saturation_over_time,
    sensitivity_bars,
    threshold_traces,
    traced,
)
from lightning_lowbit.reports.sensitivity import COLUMNS, Sensitivity
from lightning_lowbit.reports.summary import Summary, claims, summarize
from lightning_lowbit.reports.table import LAYERS, metric_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_lowbit.export.program import IntegerProgram

__all__ = ["html_report"]

_TRACES = (
    (saturation_over_time, "saturation", "Saturated values over time"),
    (exponent_traces, "exponent", "Exponents over time"),
    (threshold_traces, "log2_t", "Thresholds and clips over time; lines at powers of two"),
)


def html_report(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    tally: Tally | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    batches: Iterable[Any] | None = None,
    sensitivity: Sensitivity | None = None,
    log: Log | None = None,
    compared: Sequence[Point] = (),
    program: IntegerProgram | None = None,
    figures: Mapping[str, Figure] | None = None,
    plots: bool = True,
    left_out: Mapping[str, str] | None = None,
) -> Path:
    """Write what is known of a converted network as one HTML file without scripts, links or anything to load.

    Its claims stand first, then the table of `summarize`, what is tied and what stays float, and whatever else is
    given. The file is written whole or not at all; a file of that name is replaced.

    Args:
        module: converted, calibrated or not.
        path: of the file; its folder is there.
        title: default the module's class and its scheme.
        tally: saturation counts, as `summarize` takes them.
        metrics: the user's own validation metrics of the stages float, calibrated and trained.
        batches: shown as histograms of activations; as `sensitivity` takes them.
        sensitivity: of this network.
        log: logged values of its training (`reports.plots.read_log`).
        compared: networks for accuracy against size.
        program: what it lowers to.
        figures: further plots by caption.
        plots: False draws none, and needs no matplotlib.
        left_out: what the page might have shown and does not, and why.
    Returns:
        the path.
    Raises:
        ConfigError: nothing is converted; plots are wanted and matplotlib is not installed; the folder is missing.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"html_report: got path={str(path)!r}, whose folder is not there. Make it, or give another.")
    report = summarize(module, tally)
    low = dict(low_bit_modules(module))
    scheme = next(iter(low.values())).scheme.name
    drawn = _drawn(module, low, batches, sensitivity, log, compared) if plots else {}
    drawn.update(figures or {})
    parts = [
        page.section("Claims", [page.listed(claims(module, report))]),
        page.section("Metrics", [page.preformatted("\n".join(metric_lines(metrics)))] if metrics else []),
        page.section("Layers", _layers(report)),
        page.section("Shared grids", [page.listed(" = ".join(tie) for tie in report.ties)]),
        page.section("What stays float, and other notes", [page.listed(_notes(module, report))]),
        page.section("Sensitivity", _sensitivity(sensitivity)),
        page.section(
            "Plots", [page.figure(plot, caption, n) for n, (caption, plot) in enumerate(drawn.items(), start=1)]
        ),
        page.section("Integer program", [page.preformatted(str(program.summary()))] if program is not None else []),
        page.section("Not on this page", [page.listed(f"{name}: {why}" for name, why in (left_out or {}).items())]),
    ]
    content = page.page(title or f"{type(module).__name__}, {scheme}", [part for part in parts if part])
    write_atomically(path, content.encode())
    return path


def _layers(report: Summary) -> list[str]:
    """A line a layer, and folded away a line a tensor."""
    lines = page.table(
        LAYERS.names,
        [line.cells() for line in report.lines],
        right=LAYERS.right,
        warned=[n for n, line in enumerate(report.lines) if line.exact is False],
    )
    widths = report.widths()
    names = ("tensor", "total", "integer", "fraction", "signed", "saturation", "sum needs")
    rows = [row.cells() for row in widths.listed]
    wide = [n for n, row in enumerate(widths.listed) if row.too_wide]
    tensors = page.table(names, rows, names[1:], wide, f"All {len(rows)} tensors: bits of codes and of sums")
    return [lines, tensors]


def _notes(module: nn.Module, report: Summary) -> list[str]:
    said = claims(module, report)
    return [note for note in report.notes if note not in said]


def _sensitivity(found: Sensitivity | None) -> list[str]:
    if found is None:
        return []
    rows = [row.cells() for row in found.listed]
    worst = [number for number, row in enumerate(found.listed) if row.note]
    return [page.listed(found.words), page.table(COLUMNS.names, rows, COLUMNS.right, worst)]


def _drawn(
    module: nn.Module,
    low: Mapping[str, LowBitModule],
    batches: Iterable[Any] | None,
    sensitivity: Sensitivity | None,
    log: Log | None,
    compared: Sequence[Point],
) -> dict[str, Figure]:
    """By caption: what there is something to show of."""
    wanted: dict[str, Callable[[], Figure]] = {}
    weights = [part.lowbit_weight for part in low.values() if isinstance(part, LowBitLayer)]
    if any(weight is not None and weight.ready for weight in weights):
        wanted["Weights before rounding, and their grids"] = partial(weight_histograms, module)
    if batches is not None and rounding_activations(module):
        wanted["Activations before rounding, and their grids"] = partial(activation_histograms, module, batches)
    if sensitivity is not None and heights(sensitivity, sensitivity.metric):
        wanted["Sensitivity of the layers"] = partial(sensitivity_bars, sensitivity, sensitivity.metric)
    for draw, metric, caption in _TRACES:
        if log is not None and traced(log, metric):
            wanted[caption] = partial(draw, log)
    if compared:
        wanted["Accuracy against size"] = partial(accuracy_against_size, compared)
    return {caption: draw() for caption, draw in wanted.items()}
