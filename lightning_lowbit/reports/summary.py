"""``summarize``: one row a site, with its grid, how much saturates, and whether the layer's float sums are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_lowbit.modules.base import LowBitModule, Tally, low_bit_modules, switch_of
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitCat
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.guards import float_sums_exact

__all__ = ["Report", "Row", "print_report", "summarize", "sums_exact"]

_COLUMNS = ("site", "role", "pattern", "grid", "saturation", "exact")


@dataclass(frozen=True)
class Row:
    """One tensor: ``grid`` None while it is float; ``exact`` None where there is no sum."""

    site: str
    role: str
    pattern: str
    grid: Grid | None
    saturation: float | None = None
    exact: bool | None = None

    def cells(self) -> tuple[str, ...]:
        saturation = "" if self.saturation is None else f"{100 * self.saturation:.2f} %"
        exact = "" if self.exact is None else ("exact" if self.exact else "not exact")
        return self.site, self.role, self.pattern, "float" if self.grid is None else str(self.grid), saturation, exact


@dataclass
class Report:
    """A table, what stays float and why, ties, and the claims that hold for this network."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join((*_plain_table([_COLUMNS, *(row.cells() for row in self.rows)]), "", *self.notes))

    def __getitem__(self, site: str) -> Row:
        for row in self.rows:
            if site in (row.site, f"{row.site}.{row.role}"):
                return row
        raise KeyError(site)


def summarize(module: nn.Module, tally: Tally | None = None) -> Report:
    """What a converted module does, tensor by tensor.

    Args:
        module: converted, calibrated or not.
        tally: saturation counts, as collected on a validation batch; without them the column is empty.
    Returns:
        a printable report.
    Raises:
        ConfigError: nothing in the module is converted.
    """
    switch, report = switch_of(module), Report()
    for path, low in low_bit_modules(module):
        report.rows.extend(_rows(path, low, tally))
    hooked = [q for m in module.modules() if not isinstance(m, LowBitModule) for q in m.children() if isinstance(q, Quantizer)]
    report.rows.extend(_row(q, q.site.pattern, tally) for q in hooked)
    conversion = switch.conversion
    report.ties = conversion.ties
    total = len(conversion.layers) + len(conversion.skipped)
    report.notes.append(f"{len(conversion.layers)} of {total} layers low-bit, {len(report.ties)} ties; scheme {_scheme_line(module)}")
    report.notes += [f"skipped: {path} ({why})" for path, why in conversion.skipped.items()]
    if conversion.float_by_nature:
        kinds = ", ".join(f"{name} ({len(paths)})" for name, paths in conversion.float_by_nature.items())
        report.notes.append(f"float by nature: {kinds}")
    report.notes += [f"not followed: {note}" for note in conversion.uncovered]
    report.notes += claims(module, report)
    return report


def claims(module: nn.Module, report: Report) -> list[str]:
    """Whether evaluation is integer-exact and training bit-identical, and if not, why."""
    scheme = next(low.scheme for _, low in low_bit_modules(module))
    conversion = switch_of(module).conversion
    reasons = []
    if not switch_of(module).started:
        reasons.append("not calibrated yet")
    inexact = [row.site for row in report.rows if row.exact is False]
    if inexact:
        reasons.append(f"{len(inexact)} layers' float sums are not proved exact ({inexact[0]} first)")
    if conversion.uncovered:
        reasons.append("float operations between layers")
    if conversion.skipped or conversion.float_by_nature:
        reasons.append("float layers")
    exact = "yes, up to the float result of the last layer" if not reasons else f"no: {'; '.join(reasons)}"
    training = "yes" if scheme.carries_errors else "no: gradients are float"
    return [f"evaluation integer-exact: {exact}", f"training bit-identical on any machine: {training}"]


def sums_exact(layer: LowBitLayer) -> bool | None:
    """Whether the guard proves the layer's float32 sums exact for its actual weights; None while a grid is open."""
    source = layer.lowbit_input if layer.lowbit_input is not None else layer.input_grid
    weight, unit = layer.lowbit_weight, layer.accumulator_exponent()
    if source is None or weight is None or unit is None:
        return None
    grid = source.grid()
    training = layer.training
    try:
        layer.eval()
        folded, bias = layer.effective(layer.weight) if layer.norm is None or not layer.norm.training else _frozen(layer)
    finally:
        layer.train(training)
    codes = weight.quantize(folded.detach()).double() / pow2(weight.exponent(), torch.float64)
    bias_codes = None
    if bias is not None:
        moved = layer.lowbit_bias.quantize(bias.detach()) if layer.lowbit_bias is not None else bias.detach()
        bias_codes = moved.double() / pow2(unit, torch.float64)
    if layer.out_axis == 1 and layer.groups > 1:  # one group after the other holds its own outputs
        codes = codes.reshape(layer.groups, -1, *codes.shape[1:]).transpose(1, 2).flatten(0, 1)
        return bool(float_sums_exact(codes, float(max(-grid.qmin, grid.qmax)), bias_codes, 0))
    return bool(float_sums_exact(codes, float(max(-grid.qmin, grid.qmax)), bias_codes, layer.out_axis))


def _frozen(layer: LowBitLayer) -> Any:
    """Weights as evaluation folds them."""
    assert layer.norm is not None
    kept = layer.norm.training
    layer.norm.training = False
    try:
        return layer.effective(layer.weight)
    finally:
        layer.norm.training = kept


def _rows(path: str, low: LowBitModule, tally: Tally | None) -> list[Row]:
    rows = [_row(q, low.pattern, tally) for q in low.children() if isinstance(q, Quantizer)]
    if isinstance(low, LowBitLayer):
        rows.append(Row(path, "sum", low.pattern, low.result_grid(), None, sums_exact(low)))
    elif isinstance(low, (LowBitAdd, LowBitCat)):
        rows.append(Row(path, "sum" if isinstance(low, LowBitAdd) else "concat", low.pattern, low.result_grid()))
    return rows


def _row(quantizer: Quantizer, pattern: str, tally: Tally | None) -> Row:
    site = quantizer.site
    share = None if tally is None else tally.share(site.key)
    return Row(site.path, site.slot.removeprefix("lowbit_") or site.role, pattern, quantizer.grid() if quantizer.ready else None, share)


def _scheme_line(module: nn.Module) -> str:
    return str(next(low.scheme for _, low in low_bit_modules(module)).name)


def _plain_table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def metric_lines(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """float, calibrated, trained: the user's own validation metrics, one line each."""
    lines = []
    for stage in ("float", "calibrated", "trained"):
        if metrics.get(stage):
            values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics[stage].items()))
            lines.append(f"{stage:10}  {values}")
    return lines


def print_report(module: nn.Module, metrics: Mapping[str, Mapping[str, float]], tally: Tally | None) -> None:
    """Table, claims and metrics on the terminal; with rich where it is installed."""
    report = summarize(module, tally)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("", report, "", *metric_lines(metrics), sep="\n")
        return
    table = Table(*_COLUMNS, title="low-bit network")
    for row in report.rows:
        table.add_row(*row.cells())
    console = Console()
    console.print(table)
    for line in (*report.notes, "", *metric_lines(metrics)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


