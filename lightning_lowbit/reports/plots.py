"""Plots of a low-bit network and of its training; each function returns a matplotlib Figure and keeps none."""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_lowbit.errors import ConfigError, nearest
from lightning_lowbit.reports.effects import METRICS
from lightning_lowbit.reports.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS", "Log", "Point", "accuracy_against_size", "exponent_traces", "heights", "new_figure", "read_log",
    "saturation_over_time", "sensitivity_bars", "threshold_traces", "traced",
]  # fmt: skip

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by color-blind readers, on white and on black (Okabe and Ito)."""

_MARKERS = "osD^"
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 8.0  # inches
_MOST_TRACES = 24
_LETTERS = 120  # in a line of a legend

Log = Sequence[Mapping[str, float]]
"""Logged values, a mapping per moment: "step", and names such as "lowbit/conv1.weight/saturation"."""


@dataclass(frozen=True)
class Point:
    """A trained network.

    Attributes:
        scheme: of its name.
        size: of its parameters as they are stored, in bytes.
        accuracy: in [0, 1].
        exact: whether its integers are proved to be those of the device; None of a float network.
    """

    scheme: str
    size: int
    accuracy: float
    exact: bool | None = None


def new_figure(height: float, width: float = _WIDTH) -> Figure:
    """An empty figure of so many inches, which no global state of pyplot knows.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots: matplotlib is not installed. Install the extra: pip install 'lightning-lowbit[report]', or leave "
            "the plots out of a report: plots=False, report --no_plots."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(figure: Figure) -> Axes:
    """The one pair of axes of a figure, without a box."""
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


# -- over time -----------------------------------------------------------------------------------------------
def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics.csv as Lightning's CSVLogger writes it; empty cells are left out.

    Raises:
        ConfigError: no such file, or one without a column "step".
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"log {os.fspath(path)!r}: {error}. Give the metrics.csv of a CSVLogger.") from error
    log = [{name: number for name, cell in row.items() if (number := _number(cell)) is not None} for row in rows]
    if not any("step" in row for row in log):
        raise ConfigError(f"log {os.fspath(path)!r}: no column 'step'. Give the metrics.csv of a CSVLogger.")
    return log


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def traced(log: Log, metric: str) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of every "lowbit/SITE/METRIC" in a log, by site; a moment without a "step" is counted.

    >>> traced([{"step": 0, "lowbit/conv1.weight/exponent": -7}, {"step": 9, "loss": 0.5}], "exponent")
    {'conv1.weight': ([0.0], [-7.0])}
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for number, moment in enumerate(log):
        for name, value in moment.items():
            site, _, last = name.removeprefix("lowbit/").rpartition("/")
            if site and last == metric and name.startswith("lowbit/"):
                steps, values = found.setdefault(site, ([], []))
                steps.append(float(moment.get("step", number)))
                values.append(float(value))
    return found


def exponent_traces(log: Log) -> Figure:
    """log2 of every tensor's step over time; it changes by whole numbers."""
    figure, axes = _traces(log, "exponent", "exponent (log2 of a step)", drawstyle="steps-post")
    axes.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator, on linear axes
    return figure


def threshold_traces(log: Log) -> Figure:
    """log2 of moving thresholds and clips over time, with a line at every power of two: TQT's steps change there."""
    figure, axes = _traces(log, "log2_t", "log2 of the threshold")
    values = [value for _, found in traced(log, "log2_t").values() for value in found if math.isfinite(value)]
    low, high = math.floor(min(values, default=0.0)), math.ceil(max(values, default=0.0))
    if high - low <= 32:
        axes.set_ylim(low - 0.1, high + 0.1)
        for level in range(low, high + 1):
            axes.axhline(level, color="#888888", linewidth=0.5, zorder=0)
    return figure


def saturation_over_time(log: Log) -> Figure:
    """Share of saturated values of every tensor over time, in percent."""
    figure, axes = _traces(log, "saturation", "saturated values (%)", scale=100.0)
    axes.set_ylim(0.0, max(1.0, axes.get_ylim()[1]))  # of a share in a million no mountain is made
    return figure


def _traces(log: Log, metric: str, label: str, scale: float = 1.0, **style: Any) -> tuple[Figure, Axes]:
    found = traced(log, metric)
    if not found:
        raise ConfigError(
            f"plots: got a log of {len(log)} moments without any 'lowbit/SITE/{metric}'. Log them in training, or give "
            "the rows of another run."
        )
    lines: dict[tuple[tuple[float, ...], ...], list[str]] = {}  # those that would lie on each other are one
    for site, (steps, values) in found.items():
        lines.setdefault((tuple(steps), tuple(values)), []).append(site)
    # Those that move most are what a reader looks for.
    shown = sorted(lines, key=lambda line: max(line[1]) - min(line[1]), reverse=True)[:_MOST_TRACES]
    words = [textwrap.fill(", ".join(map(literal, lines[line])), _LETTERS) for line in lines if line in shown]
    across = max(1, min(4, _LETTERS // (8 + max(len(row) for name in words for row in name.splitlines()))))
    rows = sum(name.count("\n") + 1 for name in words) / across
    figure = new_figure(3.2 + 0.16 * math.ceil(rows))
    axes = plain_axes(figure)
    for number, line in enumerate(line for line in lines if line in shown):
        dashes = _DASHES[number // len(COLORS) % len(_DASHES)]
        scaled = [scale * value for value in line[1]]
        axes.plot(line[0], scaled, dashes, color=COLORS[number % len(COLORS)], label=words[number], **style)
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator, on linear axes
    figure.legend(fontsize="x-small", ncols=across, frameon=False, loc="outside lower left")
    drawn = sum(len(lines[line]) for line in shown)
    if drawn < len(found):
        axes.set_title(f"the {drawn} of {len(found)} tensors that move most", fontsize="small")
    return figure, axes


def literal(words: str) -> str:
    """Text that matplotlib must not read as a formula, nor a legend as hidden.

    >>> literal("_cost$")
    ' _cost\\\\$'
    """
    return (" " * words.startswith("_") + words).replace("$", r"\$")


# -- one bar a layer, one point a network --------------------------------------------------------------------
def sensitivity_bars(found: Sensitivity, metric: str = "sqnr") -> Figure:
    """One bar a layer in the order of the network, and a line for the network with all quantizers.

    Args:
        found: by `sensitivity`.
        metric: of METRICS.
    Raises:
        ConfigError: another metric, or one that was not measured.
    """
    if metric not in METRICS:
        raise ConfigError(f"sensitivity_bars: got metric={metric!r}.{nearest(metric, METRICS)}")
    labels = {
        "sqnr": "SQNR of the outputs (dB)", "cosine": "1 - cosine of the outputs", "kl": "KL divergence (nats)",
        "accuracy": "change of accuracy (points)",
    }  # fmt: skip
    bars = heights(found, metric)
    if not bars:
        raise ConfigError(
            f"sensitivity_bars: {metric!r} was not measured, or changed nothing anywhere. Measure it with "
            f"sensitivity(module, batches, metrics=[{metric!r}])."
        )
    figure = new_figure(1.2 + 0.25 * len(bars))
    axes = plain_axes(figure)
    axes.barh([literal(site) for site in bars], list(bars.values()), color=COLORS[0])
    whole = _height(found.whole.value(metric), metric)
    if whole is not None:
        axes.axvline(whole, color=COLORS[1], linestyle="--", label="all quantized")
        axes.legend(fontsize="small", frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    axes.invert_yaxis()
    axes.set_xlabel(labels[metric])
    what = "only this layer is quantized" if found.mode == "one" else "all but this layer are quantized"
    axes.set_title(what, fontsize="small", loc="left")
    return figure


def heights(found: Sensitivity, metric: str) -> dict[str, float]:
    """What `sensitivity_bars` draws, by site: finite numbers alone."""
    return {row.site: value for row in found.rows if (value := _height(row.effect.value(metric), metric)) is not None}


def _height(value: float | None, metric: str) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return {"cosine": 1 - value, "accuracy": 100 * value}.get(metric, value)


def accuracy_against_size(points: Sequence[Point]) -> Figure:
    """Accuracy over stored size, a point a network: filled where its integers are those of the device.

    Raises:
        ConfigError: no point.
    """
    if not points:
        raise ConfigError("accuracy_against_size: got no point, expected one a network.")
    figure = new_figure(4.0)
    axes = plain_axes(figure)
    for number, point in enumerate(points):
        color, marker = COLORS[number % len(COLORS)], _MARKERS[number // len(COLORS) % len(_MARKERS)]
        filled, place = color if point.exact else "none", (point.size / 1024, 100 * point.accuracy)
        axes.plot(*place, marker, markersize=9, color=color, markerfacecolor=filled, label=literal(point.scheme))
    # Not beside the points: networks of one size and accuracy would hide each other's names.
    figure.legend(fontsize="small", frameon=False, loc="outside right center")
    axes.margins(0.15)
    axes.set(xlabel="stored parameters (KiB)", ylabel="accuracy (%)")
    axes.set_title("filled: the device computes the same integers", fontsize="small")
    return figure
