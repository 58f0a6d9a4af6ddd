"""``summarize``: every tensor's grid and saturation, what its sums need, whether float ones are exact, what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.graph.fold import per_output
from lightning_lowbit.graph.network import follow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.modules.base import LowBitModule, Tally, low_bit_modules, switch_of
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitCat, LowBitOp
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.widths import ACCUMULATOR_BITS, Format, accumulator_bits, bits_of_sum
from lightning_lowbit.reports.cost import float_bytes, product_kind, sizes
from lightning_lowbit.reports.repeats import differs
from lightning_lowbit.reports.table import Line, show, text
from lightning_lowbit.reports.widths import Row, Widths

__all__ = ["Row", "Summary", "Sums", "claims", "print_report", "summarize", "sums_of"]

_FLOAT_BITS = 25  # signed codes of so many bits are float32 numbers, and so are all sums on the way to them


@dataclass(frozen=True)
class Sums:
    """A layer's sums of products: None while a grid is open.

    Attributes:
        exact: whether float32 sums are proved to be the integer sums.
        bits: the width that holds them, sign included.
    """

    exact: bool | None = None
    bits: int | None = None


@dataclass
class Summary:
    """What a converted network does.

    Attributes:
        rows: one a tensor, in the order in which the network runs.
        lines: one a layer or operation: what is printed.
        notes: what stays float and why, and the claims that hold for this network.
        ties: site keys that share one grid.
        size: bytes of parameters as a device stores them (`reports.cost.sizes`).
        float_size: bytes of the float network's parameters.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    size: int = 0
    float_size: int = 0

    def __str__(self) -> str:
        return text(self.lines, self.notes)

    def __getitem__(self, site: str) -> Row:
        """The first row of a module, or the one called ``site.role``; KeyError names what there is."""
        for row in self.rows:
            if site in (row.site, row.name):
                return row
        raise KeyError(f"{site!r}; rows: {', '.join(row.name for row in self.rows)}")

    def widths(self) -> Widths:
        """How many bits every tensor has and every sum needs: a table to print."""
        return Widths(self.rows)


def summarize(module: nn.Module, tally: Tally | None = None) -> Summary:
    """What a converted module does, tensor by tensor.

    Args:
        module: converted, calibrated or not.
        tally: saturation counts, as collected on a validation batch; without them the column is left out.
    Returns:
        a printable report.
    Raises:
        ConfigError: nothing in the module is converted.
    """
    switch = switch_of(module)
    conversion = switch.conversion
    order = _execution_order(module)
    low = sorted(low_bit_modules(module), key=lambda item: order.get(item[0], len(order)))
    report = Summary(ties=conversion.ties)
    places = [
        (order.get(owner.site.path if isinstance(owner, Quantizer) else path, len(order)), path, owner)
        for path, owner in _owners(module)
    ]
    for _, path, owner in sorted(places, key=lambda place: place[0]):
        report.rows.extend(_rows(path, owner, tally))
    stored = sizes(module)
    report.lines = _lines(low, report.rows, stored)
    report.size, report.float_size = sum(stored.values()), float_bytes(module)
    total = len(conversion.layers) + len(conversion.skipped)
    shared = f", {len(report.ties)} shared grid{'s' * (len(report.ties) > 1)}" if report.ties else ""
    report.notes.append(f"{len(conversion.layers)} of {total} layers low-bit, scheme {low[0][1].scheme.name}{shared}")
    share = report.size / report.float_size if report.float_size else 1
    report.notes.append(f"{report.size:,} bytes of parameters, {share:.2f} of float32")
    report.notes.append("; ".join(_legend(report)))
    report.notes += [f"skipped: {path} ({why})" for path, why in conversion.skipped.items()]
    if conversion.float_by_nature:
        kinds = ", ".join(f"{name} ({len(paths)})" for name, paths in conversion.float_by_nature.items())
        report.notes.append(f"float by nature: {kinds}")
    report.notes += [f"not followed: {note}" for note in conversion.uncovered]
    report.notes += conversion.notes
    report.notes += [f"trains badly: {finding}" for finding in conversion.findings]
    wide = [f"{row.site} ({row.accumulator_bits})" for row in report.rows if row.too_wide]
    if wide:
        report.notes.append(f"sums that need more than {ACCUMULATOR_BITS} bits: {', '.join(wide)}")
    report.notes += claims(module, report)
    return report


def _legend(report: Summary) -> Iterator[str]:
    """What the columns say, of those that there are."""
    signs = any(row.grid is not None and row.grid.binary for row in report.rows)
    yield f"grid: input × weights, int4·2^-3 = signed 4-bit codes worth 2^-3 each{', ±1 = signs' * signs}"
    yield "mac: bits of input × weight → of their sum"
    if any(line.saturation is not None for line in report.lines):
        yield "saturated: share of the worst of its tensors"
    if any(line.exact is False for line in report.lines):
        yield "not exact: its float sums are not proved to be the integer sums"


def claims(module: nn.Module, report: Summary) -> list[str]:
    """Whether evaluation is integer-exact and training bit-identical, and if not, why."""
    conversion = switch_of(module).conversion
    reasons = []
    if not switch_of(module).started:
        reasons.append("not calibrated yet")
    inexact = [row.site for row in report.rows if row.exact is False]
    if inexact:
        reasons.append(f"{len(inexact)} float sums are not proved exact ({inexact[0]} first)")
    if conversion.uncovered or conversion.between:
        names = ", ".join(conversion.between[:3]) + ", ..." * (len(conversion.between) > 3)
        reasons.append("float operations between layers" + (f" ({names})" if names else ""))
    if conversion.skipped or conversion.float_by_nature:
        reasons.append("float layers")
    low = [module for _, module in low_bit_modules(module)]
    floats = [
        m.path for m in low if isinstance(m, LowBitLayer) and m.input_grid is None and not m.scheme.carries_errors
    ]
    if floats:
        reasons.append(f"{len(floats)} layers read floats ({floats[0]} first)")
    norms = sum(
        getattr(part, "island", False)
        and not (part.scheme.carries_errors or hasattr(part.lowbit_accumulator, "formats"))
        for part in low
    )
    if norms:
        reasons.append(f"{norms} float batch norm{'s' * (norms != 1)} between integer sums")
    kept = sum(isinstance(part, _BatchNorm) and not isinstance(part, LowBitModule) for part in module.modules())
    if kept:
        reasons.append(f"{kept} float batch norm{'s' * (kept != 1)}")
    rectifiers = sum(
        isinstance(q, Quantizer) and not (q.has_grid or q.site.role in ("unit", "error") or hasattr(q, "formats"))
        for q in module.modules()
    )
    if rectifiers:
        reasons.append(f"{rectifiers} float activations")
    exact = "yes, up to the float result of the last layer" if not reasons else f"no: {'; '.join(reasons)}"
    return [f"evaluation integer-exact: {exact}", f"training bit-identical on any machine: {_identical(module)}"]


def _identical(module: nn.Module) -> str:
    """Whether training gives the same bits anywhere: integers throughout, and norms whose sums are integers."""
    why = differs(module)
    if why:
        return f"no: {why}"
    norms = sum(1 for _, low in low_bit_modules(module) if getattr(low, "island", False))
    return "yes" + (f", with {norms} batch norms as islands between integers" if norms else "")


def sums_of(layer: LowBitLayer) -> Sums:
    """What is known of a layer's sums in evaluation, by its actual weights and all that its input's grid allows."""
    source, weight = layer.input_grid, layer.lowbit_weight
    exact = True if layer.scheme.proves_sums(layer) else None
    if source is None or weight is None or not (source.ready and weight.ready):
        return Sums(exact)
    folded, bias = layer.in_evaluation()
    values = _evaluated(weight, folded)  # first: some grids are that of the weight that was quantized last
    grid, grid_w = source.grid(), weight.grid()
    codes = values / _per_output(grid_w.steps, values, layer)
    terms = codes * max(grid.zero_point - grid.qmin, grid.qmax - grid.zero_point)
    if grid.axis is not None:  # channels on steps of their own add up on the finest
        steps = values.new_tensor(grid.steps)
        terms = terms * per_output(steps / steps.min(), terms, 1 - layer.out_axis, layer.groups)
    biases, whole = None, bias is None
    if bias is not None and layer.lowbit_bias is not None:  # a float one is added behind, and is no multiple of theirs
        biases = _evaluated(layer.lowbit_bias, bias) / (min(grid.steps) * values.new_tensor(grid_w.steps))
        whole, biases = bool((biases == biases.round()).all()), biases.round()
    if layer.out_axis == 1:  # a transposed convolution: one group after the other holds its own outputs
        terms = terms.reshape(layer.groups, -1, *terms.shape[1:]).transpose(1, 2).flatten(0, 1)
    try:
        bits = bits_of_sum(terms, 1, biases)
    except ConfigError:  # no finite weights: the worst that there can be
        return Sums(exact or False, accumulator_bits(grid.bits, grid_w.bits, terms[0].numel()))
    powers = source.has_exponent and weight.has_exponent  # products of other steps are rounded
    return Sums(exact or (powers and whole and bits <= _FLOAT_BITS), bits)


def _evaluated(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """Values on their grid in float64, as evaluation has them, whatever mode the quantizer is in."""
    training = quantizer.training
    quantizer.training = False  # in training signs come with a scale, and some biases are float
    try:
        return quantizer.quantize(x.detach()).double()
    finally:
        quantizer.training = training


def _per_output(steps: Sequence[float], weight: torch.Tensor, layer: LowBitLayer) -> torch.Tensor:
    values = weight.new_tensor(steps)
    return values if len(steps) == 1 else per_output(values, weight, layer.out_axis, layer.groups)


def print_report(
    module: nn.Module, metrics: Mapping[str, Mapping[str, float]], tally: Tally | None, notes: Sequence[str] = ()
) -> None:
    """Table, claims, what the run has to say (``notes``) and metrics on the terminal; in color where rich is."""
    report = summarize(module, tally)
    show(report.lines, [*report.notes, *notes], metrics)


# -- rows: one a tensor --------------------------------------------------------------------------------------
def _execution_order(module: nn.Module) -> dict[str, int]:
    """Position of every module path in the data flow; a functional operation has the name it was given."""
    order: dict[str, int] = {}
    for call in follow(module).calls:
        path = call.path
        if path is None:
            forward = module.get_submodule(call.owner).__dict__.get("forward")
            name = {**forward.instead, **forward.after}.get(call.key) if isinstance(forward, TracedForward) else None
            path = None if name is None else f"{call.owner}.{name}".lstrip(".")
        if path is not None:
            order.setdefault(path, len(order))
    return order


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold quantizers, and low-bit ones without: an add whose operands arrive on grids."""
    for path, owner in module.named_modules():
        if isinstance(owner, LowBitModule) or any(isinstance(child, Quantizer) for child in owner.children()):
            yield path, owner


def _rows(path: str, owner: nn.Module, tally: Tally | None) -> Iterator[Row]:
    sums = sums_of(owner) if isinstance(owner, LowBitLayer) else None  # first: it renews the weight's grid
    for child in owner.children():
        if not isinstance(child, Quantizer):
            continue
        site = child.site
        pattern = owner.pattern if isinstance(owner, LowBitModule) else site.pattern
        if child.has_grid:
            role = site.slot.removeprefix("lowbit_") or site.role
            yield Row(site.path, role, pattern, child.grid() if child.ready else None, _share(tally, site.key))
        for symbol, form in _formats(child).items():
            grid = None if form is None else form.grid()
            yield Row(site.path, symbol, pattern, grid, _share(tally, f"{site.path}.{symbol}"))
    if isinstance(owner, LowBitLayer) and sums is not None:
        yield Row(path, "sum", owner.pattern, owner.result_grid(), None, sums.exact, sums.bits)
    elif isinstance(owner, LowBitAdd):
        grid = owner.result_grid()
        bits = None if grid is None else grid.bits
        exact = None if bits is None else bits <= _FLOAT_BITS  # steps far apart leave float32 too few
        yield Row(path, "sum", owner.pattern, grid, None, exact, bits)
    elif isinstance(owner, LowBitCat):
        yield Row(path, "concat", owner.pattern, owner.result_grid())


def _share(tally: Tally | None, key: str) -> float | None:
    return None if tally is None else tally.share(key)


def _formats(quantizer: Quantizer) -> Mapping[str, Format | None]:
    """Of one that stands for several tensors, such as those inside a batch norm: their formats by symbol."""
    found: Mapping[str, Format | None] = getattr(quantizer, "formats", dict)()
    return found


# -- lines: one a layer or operation -------------------------------------------------------------------------
def _lines(low: Sequence[tuple[str, LowBitModule]], rows: Sequence[Row], stored: Mapping[str, int]) -> list[Line]:
    """Each quantizer is shown where its tensor is read; behind an arrow where nothing here reads it."""
    shares = {f"{row.site}.lowbit_{row.role}": row.saturation for row in rows}
    sums = {row.site: (row.exact, row.accumulator_bits) for row in rows if row.role == "sum"}
    reading = [(path, module, _reads(module)) for path, module in low]
    read = {id(quantizer) for _, _, tensors in reading for quantizer in tensors}
    lines = []
    for path, module, tensors in reading:
        result = getattr(module, "lowbit_output", None)
        result = result if result is not None and result.has_grid else None
        pooled = isinstance(module, LowBitOp) and module.lowbit_kind is Kind.AVG_POOL
        grid = _formula(module, tensors)
        if result is not None and (pooled or id(result) not in read):
            grid, tensors = f"{grid} → {_short(result)}".lstrip(), [*tensors, result]
        if not grid:
            continue  # a rectifier or a norm whose result the next layer's line shows
        bias = [module.lowbit_bias] if isinstance(module, LowBitLayer) and module.lowbit_bias is not None else []
        known = [shares[q.site.key] for q in (*tensors, *bias) if shares.get(q.site.key) is not None]
        saturation = max(known, default=None)  # type: ignore[type-var]
        exact, bits = sums.get(path, (None, None))
        mac = product_kind(module, bits) if isinstance(module, LowBitLayer) else ""
        lines.append(Line(path, module.pattern, grid, mac, stored.get(path), saturation, exact))
    return lines


def _reads(module: LowBitModule) -> list[Quantizer]:
    """The quantizers that declare the grids of what a module computes with."""
    if isinstance(module, LowBitLayer):
        return [q for q in (module.input_grid, module.lowbit_weight, module.lowbit_accumulator) if q is not None]
    return list(module.operand_grids) if isinstance(module, LowBitOp) else []


def _formula(module: LowBitModule, tensors: Sequence[Quantizer]) -> str:
    if isinstance(module, LowBitLayer):
        product = f"{_short(module.input_grid)} × {_short(module.lowbit_weight)}"
        return product if module.lowbit_accumulator is None else f"{product} = {_short(module.lowbit_accumulator)}"
    if isinstance(module, LowBitAdd):
        return " + ".join(map(_short, tensors))
    return ", ".join(dict.fromkeys(map(_short, tensors)))


def _short(quantizer: Quantizer | None) -> str:
    """A grid without its range: int8·2^-4."""
    return "float" if quantizer is None or not quantizer.ready else str(quantizer.grid()).partition(" [")[0]
