"""``sensitivity``: what each layer's quantization does to the network's outputs, one layer at a time or all but one."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lowbit.errors import ConfigError, UnsupportedModelError, nearest
from lightning_lowbit.export.record import in_evaluation
from lightning_lowbit.modules.base import LowBitModule, Mode, low_bit_modules, switch_of
from lightning_lowbit.modules.base import mode as switched
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.elementwise import LowBitOp
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.reports.effects import METRICS, Effect, Measure
from lightning_lowbit.reports.table import Columns, show, text

__all__ = [
    "COLUMNS", "METRICS", "Choice", "Row", "Sensitivity", "measured", "sensitivity", "split", "switchable", "unchanged",
]  # fmt: skip

Choice = Literal["one", "all_but_one"]
_WHOLE = "all of them"
_BACKWARD = ("error", "weight_grad", "unit")  # roles of what no evaluation rounds

COLUMNS = Columns(
    ("layer", "SQNR", "cosine", "KL", "accuracy", "note"),
    kept=1,
    shortest={0: 14},
    right=frozenset({"SQNR", "cosine", "KL", "accuracy"}),
    mark="worst",
)


@dataclass(frozen=True)
class Row:
    """One layer or operation, and what its quantizers do.

    Attributes:
        site: module path.
        pattern: what was merged there.
        tensors: keys of the quantizers that were switched for it; one that two layers read stands in both rows.
        effect: on the outputs, compared with those of the network without any quantizer.
        note: what the table says beside it.
    """

    site: str
    pattern: str
    tensors: tuple[str, ...]
    effect: Effect
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        return (self.site, *self.effect.cells(), self.note)


@dataclass(frozen=True)
class Sensitivity:
    """What each layer costs: prints as a table in the order of the network.

    Attributes:
        mode: "one": only that layer is quantized. "all_but_one": every other one is.
        samples: that were run.
        rows: one a layer or operation that has quantizers.
        whole: the network with all of them, as it is deployed.
        accuracy: of the network without any quantizer; None without labels.
        notes: what was left as it is.
    """

    mode: Choice
    samples: int
    rows: tuple[Row, ...]
    whole: Effect
    accuracy: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return text(self.listed, self.words, columns=COLUMNS)

    def show(self) -> None:
        """Print it; with color where rich is installed."""
        show(self.listed, self.words, {}, COLUMNS)

    def __getitem__(self, site: str) -> Row:
        for row in self.rows:
            if row.site == site:
                return row
        raise KeyError(f"{site!r}; rows: {', '.join(row.site for row in self.rows)}")

    def ranked(self, metric: str = "sqnr") -> list[Row]:
        """Rows that were measured by ``metric``, the layer that costs most first.

        Raises:
            ConfigError: another metric.
        """
        if metric not in METRICS:
            raise ConfigError(f"ranked: got metric={metric!r}.{nearest(metric, METRICS)}")
        known = [(value, row) for row in self.rows if (value := row.effect.value(metric)) is not None]
        # Alone, the worst layer leaves the worst outputs; where it alone is float, they are the best.
        sign = (1 if self.mode == "one" else -1) * (-1 if metric == "kl" else 1)
        bad = self.mode == "one"  # outputs that are not numbers are the worst
        return [row for _, row in sorted(known, key=lambda item: (math.isnan(item[0]) != bad, sign * item[0]))]

    def to_json(self) -> dict[str, Any]:
        """Plain types; an SQNR or accuracy that was not measured is null, and so is the SQNR of equal outputs."""

        def plain(effect: Effect) -> dict[str, float | None]:
            return {k: v if v is None or math.isfinite(v) else None for k, v in asdict(effect).items()}

        content = {
            "mode": self.mode,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "whole": plain(self.whole),
            "layers": [
                {"site": row.site, "pattern": row.pattern, "tensors": list(row.tensors), **plain(row.effect)}
                for row in self.rows
            ],
            "notes": list(self.notes),
        }
        loaded: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
        return loaded

    @property
    def metric(self) -> str:
        """The first metric that there is: what rows are ranked by in print."""
        return next((m for m in METRICS if any(row.effect.value(m) is not None for row in self.rows)), METRICS[0])

    @property
    def listed(self) -> list[Row]:
        """What is printed: the rows, the worst by ``metric`` with a note, and the whole network."""
        worst = next(iter(self.ranked(self.metric)), None)
        return [*(replace(row, note="worst" * (row is worst)) for row in self.rows), Row(_WHOLE, "", (), self.whole)]

    @property
    def words(self) -> list[str]:
        """What the table means."""
        which = "only this one is quantized" if self.mode == "one" else "all but this one are quantized"
        lines = [f"{self.samples} samples; {which}, compared with the network without any quantizer"]
        if self.accuracy is not None:
            lines.append(f"accuracy: change in points, of {100 * self.accuracy:.2f} % without any quantizer")
        return [*lines, *self.notes]


def sensitivity(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    mode: Choice = "one",
    metrics: Sequence[str] = METRICS,
    target: Callable[[Any], Tensor] | None = None,
) -> Sensitivity:
    """What each layer's quantization does to the outputs of a converted network.

    Each batch is run once without any quantizer, once with all of them, and once a layer. A layer's quantizers are
    those inside it and its merged batch norm, and the one that declares its input's grid; what other operations round
    has rows of its own. Batch norms stay merged throughout, so that rows show quantization alone. It runs in
    evaluation mode; the network, its modes and torch's random numbers are afterwards as before, bit for bit.

    Args:
        module: converted, and calibrated or trained.
        batches: tensors, or tuples of the forward's arguments (those without a default) with labels behind them; a
            tensor is one batch.
        mode: "one" quantizes one layer at a time, "all_but_one" leaves one at a time float.
        metrics: of METRICS: sqnr in dB, cosine, kl of softmax over axis 1 in nats, accuracy where there are labels.
        target: gives the labels of a batch, int64 [N, ...]; default what stands behind the forward's arguments.
    Raises:
        ConfigError: nothing is converted or calibrated, no batch, an unknown mode or metric.
        UnsupportedModelError: the scheme's parameters are integers, so that there is no float network inside.
    """
    _require_choices(mode, metrics)
    groups = _groups(module)
    every = {q for _, quantized in groups.values() for q in quantized}
    runs = {site: set(own) if mode == "one" else every - set(own) for site, (_, own) in groups.items()}
    measures = measured(module, batches, {_WHOLE: every, **runs}, metrics, target)
    rows = [
        Row(site, pattern, tuple(q.site.key for q in own), measures[site].effect())
        for site, (pattern, own) in groups.items()
    ]
    whole = measures[_WHOLE]
    return Sensitivity(mode, whole.samples, tuple(rows), whole.effect(), whole.accuracy, tuple(_left(module)))


def measured(
    module: nn.Module,
    batches: Iterable[Any],
    runs: Mapping[str, set[Quantizer]],
    metrics: Sequence[str] = METRICS,
    target: Callable[[Any], Tensor] | None = None,
) -> dict[str, Measure]:
    """What sets of quantizers do to the outputs, each compared with the network without any.

    Args:
        module, batches, metrics, target: as `sensitivity` takes them.
        runs: the quantizers that are on, by name; of those of `switchable`.
    Raises:
        ConfigError: no batch.
    """
    every = switchable(module)
    found = {name: Measure(metrics) for name in runs}
    number = -1
    with unchanged(module), in_evaluation(module), torch.no_grad():
        for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
            arguments, labels = split(module, batch, number)
            labels = labels if target is None else target(batch)
            with _only(module, set(), every):
                reference = _run(module, arguments)
            for name, on in runs.items():
                with _only(module, on, every):
                    found[name].add(reference, _run(module, arguments), labels)
    if number < 0:
        raise ConfigError("sensitivity: got no batch, expected at least one. Give a loader, or a list of tensors.")
    return found


def _require_choices(mode: str, metrics: Sequence[str]) -> None:
    if mode not in get_args(Choice):
        raise ConfigError(f"sensitivity: got mode={mode!r}.{nearest(str(mode), get_args(Choice))}")
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"sensitivity: got metric {metric!r}.{nearest(str(metric), METRICS)}")
    if not metrics:
        raise ConfigError(f"sensitivity: got no metric, expected some of {', '.join(METRICS)}.")


# -- which quantizers belong together ------------------------------------------------------------------------
def switchable(module: nn.Module) -> set[Quantizer]:
    """The quantizers that evaluation goes through, and that can be left out.

    Raises:
        ConfigError, UnsupportedModelError: as `sensitivity` says.
    """
    switch = switch_of(module)
    scheme = next(low.scheme for _, low in low_bit_modules(module))
    if scheme.carries_errors:
        raise UnsupportedModelError(
            f"sensitivity: {type(module).__name__} was converted with scheme {scheme.name}, whose parameters are "
            "integers: there is no float layer to compare with. Convert the float checkpoint with a scheme that keeps "
            "float weights, such as 'tqt'."
        )
    active = {q for _, q in quantizers(module) if q.ready and q.has_grid and q.site.role not in _BACKWARD}
    if not switch.started or not active:
        raise ConfigError(
            f"sensitivity: {type(module).__name__} is not calibrated. Run convert(module, scheme, example_input=batch) "
            "first, or validate it with QuantCallback()."
        )
    return active


def _groups(module: nn.Module) -> dict[str, tuple[str, list[Quantizer]]]:
    """Site -> pattern and quantizers, layers first in module order, then operations."""
    active, low = switchable(module), dict(low_bit_modules(module))
    found: dict[str, tuple[str, list[Quantizer]]] = {}
    taken: set[Quantizer] = set()

    def group(path: str, pattern: str, members: Iterable[Quantizer | None]) -> None:
        own = list(dict.fromkeys(q for member in members if member in active for q in _together(member, active)))
        if own:
            found[path] = (pattern, own)
            taken.update(own)

    for path, layer in low.items():
        if isinstance(layer, LowBitLayer):
            merged = [] if layer.norm is None else _children(layer.norm)
            group(path, layer.pattern, [layer.input_grid, *_children(layer), *merged])
    for path, op in low.items():
        if isinstance(op, LowBitOp) and op.operand_grids:  # what it reads is its own, not a rectifier's before it
            group(path, op.pattern, [q for q in (*op.operand_grids, *_children(op)) if q not in taken])
    for path, owner in module.named_modules():
        rest = [q for q in _children(owner) if q not in taken]
        group(path, owner.pattern if isinstance(owner, LowBitModule) else type(owner).__name__, rest)
    return found


def _children(owner: nn.Module) -> list[Quantizer]:
    return [child for child in owner.children() if isinstance(child, Quantizer)]


def _together(quantizer: Quantizer | None, active: set[Quantizer]) -> list[Quantizer]:
    """A tensor whose unit belongs to its format is switched for all of its readers."""
    assert quantizer is not None
    if any(member.site.role == "unit" for member in quantizer.group):
        return [member for member in quantizer.group if member in active]
    return [quantizer]


def _left(module: nn.Module) -> list[str]:
    """What is quantized in all runs alike."""
    norms = [q.site.path for _, q in quantizers(module) if not q.has_grid and q.site.role == "sum"]
    return [f"batch norms on grids of their own stay so in all runs: {', '.join(norms)}"] if norms else []


# -- running -------------------------------------------------------------------------------------------------
@contextmanager
def _only(module: nn.Module, on: set[Quantizer], every: set[Quantizer]) -> Iterator[None]:
    """The network with some of its quantizers; the others pass tensors through, as before calibration."""
    off = every - on
    open_layers = [m for _, m in low_bit_modules(module) if isinstance(m, LowBitLayer) and m.lowbit_weight in off]
    # The quantizer behind a layer that does its work: where the layer is float it has to do it itself.
    ends = [end for layer in open_layers if getattr(end := _end_of(layer), "fused", False)]
    hooks = [quantizer.register_forward_hook(_narrow) for quantizer in off]
    try:
        for quantizer in off:
            quantizer.ready = False
        for end in ends:
            end.fused = False
        yield
    finally:
        for end in ends:
            end.fused = True
        for quantizer in off:
            quantizer.ready = True
        for hook in hooks:
            hook.remove()


def _end_of(layer: LowBitLayer) -> Any:
    return getattr(layer.__dict__.get("group"), "end", None)


def _narrow(quantizer: nn.Module, inputs: Any, output: Any) -> Any:
    """Exact sums come in float64, and a float layer takes its own dtype alone."""
    like = quantizer.__dict__.get("like")
    dtype = torch.float32 if like is None else like.weight.dtype
    return output.to(dtype) if isinstance(output, Tensor) and output.dtype == torch.float64 else output


def _run(module: nn.Module, arguments: Sequence[Any]) -> list[Tensor]:
    found = [x.double() for x in tree_leaves(module(*arguments)) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise ConfigError(
            f"sensitivity: the forward of {type(module).__name__} gives no float tensor to compare. Pass the part of "
            "the network that does."
        )
    return found


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers and random numbers as they were; no counts, no notes of what ran, low-bit mode in between."""
    switch = switch_of(module)
    tally, ran, buffers = switch.tally, switch.ran, [(b, b.clone()) for b in module.buffers()]
    devices = {b.device for b in (*module.parameters(), *module.buffers()) if b.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device.index for device in devices if device.index is not None]))
        stack.enter_context(switched([switch], Mode.LOWBIT))
        try:
            switch.tally = switch.ran = None
            yield
        finally:
            switch.tally, switch.ran = tally, ran
            for buffer, before in buffers:  # some grids are noted when a tensor is quantized
                if not torch.equal(buffer.reshape(-1).view(torch.uint8), before.reshape(-1).view(torch.uint8)):
                    buffer.data.copy_(before)


def split(module: nn.Module, batch: Any, number: int) -> tuple[tuple[Any, ...], Tensor | None]:
    """The forward's arguments on the network's device, and the labels behind them."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    if not isinstance(batch, (tuple, list)):
        raise ConfigError(
            f"batch {number}: got a {type(batch).__name__}, expected a tensor or a tuple of the forward's arguments, "
            "labels behind them. Give a generator that takes them out of your batches."
        )
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = list(inspect.signature(type(module).forward).parameters.values())[1:]
    count = max(1, sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in named))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    moved = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, list(batch))
    rest = moved[count] if len(moved) > count else None
    labels = rest if isinstance(rest, Tensor) and not rest.is_floating_point() else None
    return tuple(moved[:count]), labels
