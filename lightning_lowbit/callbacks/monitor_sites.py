"""What QuantMonitor looks at: one tensor's quantizer, the metrics that it can give, and how it is seen at work."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import MeanMetric, Metric

from lightning_lowbit.errors import ConfigError, listed
from lightning_lowbit.graph.fold import per_output
from lightning_lowbit.modules.block import BlockRange, WeightCodes
from lightning_lowbit.modules.carrier import Carrier, is_codes, plain
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer, in_backward
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.plugins.distributed import all_reduce, world_size
from lightning_lowbit.reports.metrics import CodeFlips, DeadBits, SaturatedShare, Sqnr

__all__ = ["METRICS", "WatchedSite", "computed", "find_sites"]

METRICS = ("sqnr", "saturation", "dead_bits", "exponent", "drift", "log2_t", "flips", "threshold_grad")
_UNWATCHED = ("bias", "error", "weight_grad", "unit")  # a bias has bits to spare, an error comes backward
_UNSEEN = "it did not come by in the batch: unused, or in code made by torch.compile, which runs past hooks"
_SIGNS = "of signs there are none"
_SHOWN = 4096  # codes in a histogram


class WatchedSite:
    """One quantizer under watch.

    Args:
        quantizer: whose tensor it is.
        owner: the module that holds it.
        wanted: names of metrics.
        most_values: of a tensor that are looked at in one call; weights are looked at as a whole.

    Attributes:
        name: ``conv1.weight``.
        metrics: of this process since the last reset, by name; without ``drift``, which is a change.
        missing: why it cannot give a metric, by name.
        shown: codes for a histogram, where ``draws``.
        draws: whether somebody will draw one.
        seen: whether a batch came by since the last time.
    """

    def __init__(self, quantizer: Quantizer, owner: nn.Module, wanted: Sequence[str], most_values: int) -> None:
        self.quantizer, self.owner, self.wanted, self.most_values = quantizer, owner, wanted, most_values
        site = quantizer.site
        self.name = f"{site.path}.{site.slot.removeprefix('lowbit_') or site.role}".lstrip(".")
        self.metrics: dict[str, Metric] = {}
        self.missing: dict[str, str] = {}
        self.draws, self.shown = False, torch.empty(0)
        self.seen = False
        self._codes: Tensor | None = None  # of a weight at the last time
        self._exponent: float | None = None

    @property
    def is_weight(self) -> bool:
        return self.quantizer.site.role == "weight" and isinstance(self.owner, LowBitLayer)

    @property
    def on(self) -> bool:
        """Whether it quantizes by now."""
        return self.quantizer.ready and self.quantizer.switch.quantizing

    def prepare(self, device: torch.device) -> None:
        """New metrics, none seen."""
        mean = functools.partial(MeanMetric, nan_strategy="ignore")
        kinds: dict[str, Callable[..., Metric]] = {
            "sqnr": Sqnr, "saturation": SaturatedShare, "dead_bits": DeadBits, "exponent": mean
        }  # fmt: skip
        if self.is_weight:
            kinds["flips"] = CodeFlips
        if getattr(self.quantizer, "log2_t", None) is not None:
            kinds["threshold_grad"] = mean
        if self.quantizer.log2_threshold() is not None:
            kinds["log2_t"] = mean
        needed = {"exponent" if name == "drift" else name for name in self.wanted}
        # Processes exchange all states at once.
        self.metrics = {n: kind(sync_on_compute=False).to(device) for n, kind in kinds.items() if n in needed}

    def fill(self) -> None:
        """Update metrics that saw nothing with nothing: torchmetrics warns of one that is computed without."""
        for name, metric in self.metrics.items():
            empty = torch.empty(0, device=metric.device)
            if metric.update_called:
                continue
            if name == "saturation":
                metric.update(empty.sum(dtype=torch.int64), 0)
            elif name == "dead_bits":
                metric.update(empty, _magnitude_bits(self.quantizer.grid()) if self.quantizer.ready else 0)
            else:
                metric.update(*([empty] * (2 if name in ("sqnr", "flips") else 1)))

    # -- in a batch ----------------------------------------------------------------------------------------
    def hook(self) -> Iterator[RemovableHandle]:
        """Stand by the tensor until the handles are removed."""
        if self.is_weight:
            return
        yield self.quantizer.register_forward_hook(self._see, with_kwargs=True)
        if isinstance(self.quantizer, BlockRange) and self.quantizer.site.slot == "lowbit_accumulator":
            yield self.owner.register_forward_hook(self._see_sums)  # rounded inside, without a call of the quantizer

    def _see(self, quantizer: Quantizer, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the quantizer; what passes as it is (fused, or codes already) is nothing to see.

        A graph that torch.compile records keeps its hooks when they are removed: in there this does nothing.
        """
        if not self._live() or output is args[0]:
            return
        self.seen = True
        with torch.no_grad():
            value = kwargs.get("value")
            x = plain(self._part((args[0] if value is None else value).detach()))
            if kwargs.get("rectify", args[1] if len(args) > 1 else False):
                x = F.relu(x)
            if isinstance(output, Carrier):
                codes = self._part(output.payload)
                if "sqnr" in self.metrics:
                    self.metrics["sqnr"].update(x, codes.to(torch.float32) * pow2(output.exponent))
                self._look(codes, output.exponent)
                return
            grid, y = quantizer.grid(), self._part(output.detach())
            steps = _along(y.new_tensor(grid.steps), y, grid.axis)
            self._compare(x, y, grid)
            self._count(x, grid, steps)
            self._look_at_codes(torch.round(y / steps), grid)

    def _see_sums(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a module whose sums become codes inside it."""
        if self._live() and is_codes(output) and output.origin is owner:
            self.seen = True
            with torch.no_grad():
                self.missing.setdefault("sqnr", "integer sums are rounded inside the layer")
                self._look(self._part(output.payload), output.exponent)

    def _live(self) -> bool:
        """Calibration and evaluation pass as well, without gradients; checkpointed blocks pass twice."""
        return not torch.compiler.is_compiling() and torch.is_grad_enabled() and not in_backward() and self.on

    def _part(self, x: Tensor) -> Tensor:
        every = math.ceil(x.numel() / self.most_values)
        return x[::every] if every > 1 else x

    def take_gradient(self, scale: float) -> None:
        """The threshold's gradient, before the step that uses it."""
        threshold: Any = self.quantizer.log2_t if "threshold_grad" in self.metrics else None
        gradient = None if threshold is None else threshold.grad
        if gradient is not None and self.on:
            self.metrics["threshold_grad"].update(gradient.detach().float().abs() / scale)

    # -- behind it -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def finish(self) -> None:
        """Look at the weight as evaluation would have it, or at the grid of another tensor."""
        if not self.on:
            return
        if not (self.seen or self.is_weight):
            for name in ("sqnr", "saturation", "dead_bits"):
                self.missing.setdefault(name, _UNSEEN)
        self.seen = False
        if "log2_t" in self.metrics and (threshold := self.quantizer.log2_threshold()) is not None:
            self.metrics["log2_t"].update(threshold.float())
        if self.is_weight:
            self._see_weight(self.owner)
        elif not isinstance(self.quantizer, BlockRange):  # those tell batch by batch
            self._follow_grid(self.quantizer.grid())

    def _see_weight(self, layer: Any) -> None:
        quantizer = self.quantizer
        if isinstance(quantizer, WeightCodes):
            self.missing.setdefault("sqnr", "its parameter holds the codes")
            codes = quantizer.codes()
            self._look(codes, quantizer.exponent())
            self._flip(codes)
            return
        with _undisturbed(quantizer):
            x = layer.in_evaluation()[0].detach()
            y = quantizer.quantize(x)
            grid = quantizer.grid()
            steps = y.new_tensor(grid.steps)
            if grid.axis is not None:
                steps = per_output(steps, y, layer.out_axis, layer.groups)
            self._compare(x, y, grid)
            self._count(x, grid, steps)
            codes = torch.round(y / steps)
            self._look_at_codes(codes, grid)
            self._follow_grid(grid)
        self._flip(codes.to(torch.int8 if grid.qmin >= -128 and grid.qmax <= 127 else torch.int32))

    def _compare(self, x: Tensor, y: Tensor, grid: Grid) -> None:
        if "sqnr" not in self.metrics:
            return
        if grid.binary:
            self.missing.setdefault("sqnr", _SIGNS)
            return
        moved = getattr(self.quantizer, "moved", None)  # a fixed-point operand, whose codes may take another label
        if moved is not None and grid.axis is None:
            x = x * 2.0 ** -moved()
        self.metrics["sqnr"].update(x, y)

    def _count(self, x: Tensor, grid: Grid, steps: Tensor) -> None:
        if "saturation" not in self.metrics:
            return
        if grid.axis is not None:
            codes = x / steps
            beyond = (codes < grid.qmin - 0.5) | (codes > grid.qmax + 0.5)
            self.metrics["saturation"].update(beyond.sum(), x.numel())
        elif grid.binary and self.is_weight and bool((x.abs() == 1).all()):
            self.missing.setdefault("saturation", "its weights are signs, with no magnitude behind them")
        elif not self.quantizer.counts:
            self.missing.setdefault("saturation", "its quantizer counts none")
        else:
            self.metrics["saturation"].update(self.quantizer.saturated(x), x.numel())

    def _look(self, codes: Tensor, exponent: Tensor) -> None:
        """Integer codes: where they stand at the end of their range they are taken for saturated."""
        bits = _magnitude_bits(self.quantizer.grid())
        if "saturation" in self.metrics:
            ends = (codes >= 2**bits - 1) | (codes <= 1 - 2**bits)
            self.metrics["saturation"].update(ends.sum(), codes.numel())
        if "dead_bits" in self.metrics:
            self.metrics["dead_bits"].update(codes, bits)
        if "exponent" in self.metrics:
            self.metrics["exponent"].update(exponent.float())
        self._show(codes)

    def _look_at_codes(self, codes: Tensor, grid: Grid) -> None:
        if grid.binary or grid.zero_point:
            self.missing.setdefault("dead_bits", _SIGNS if grid.binary else "its codes have a zero point")
        elif "dead_bits" in self.metrics:
            self.metrics["dead_bits"].update(codes, _magnitude_bits(grid))
        self._show(codes)

    def _show(self, codes: Tensor) -> None:
        if self.draws:
            codes = codes.flatten()
            self.shown = codes[:: math.ceil(codes.numel() / _SHOWN)] if codes.numel() > _SHOWN else codes

    def _follow_grid(self, grid: Grid) -> None:
        if grid.binary:
            for name in {"exponent", "drift"} & set(self.wanted):
                self.missing.setdefault(name, _SIGNS)
        elif "exponent" in self.metrics:
            steps = [math.log2(step) for step in grid.steps]
            self.metrics["exponent"].update(sum(steps) / len(steps))

    def _flip(self, codes: Tensor) -> None:
        if "flips" in self.metrics:
            if self._codes is not None and self._codes.shape == codes.shape:
                self.metrics["flips"].update(self._codes, codes)
            self._codes = codes.clone()

    def row(self, values: dict[str, float]) -> dict[str, float]:
        """Of the computed values those that mean something, in the order of ``METRICS``, with the drift."""
        found = {name: value for name, value in values.items() if not math.isinf(value)}  # exact: no noise
        now = found.get("exponent")
        if now is not None:
            if self._exponent is not None:
                found["drift"] = now - self._exponent
            self._exponent = now
        return {name: found[name] for name in METRICS if name in found and name in self.wanted}


def find_sites(
    root: nn.Module, patterns: Sequence[str], wanted: Sequence[str], most_values: int
) -> list[WatchedSite]:  # fmt: skip
    """The quantizers under watch, in module order.

    Raises:
        ConfigError: there is none, or a pattern fits none.
    """
    sites = [
        WatchedSite(quantizer, root.get_submodule(path.rpartition(".")[0]), wanted, most_values)
        for path, quantizer in quantizers(root)
        if quantizer.has_grid and quantizer.site.role not in _UNWATCHED
    ]
    if not sites:
        raise ConfigError(
            f"Trainer(callbacks=[QuantMonitor(...)]): {type(root).__name__} has no quantizer, expected a low-bit "
            "network. Add QuantCallback() to the list."
        )
    for pattern in patterns:
        if not any(_fits(pattern, site.name) for site in sites):
            raise ConfigError(
                f"QuantMonitor(sites=[{pattern!r}]): it fits none of {listed([site.name for site in sites])}. Give "
                "module paths or site names, * for any part."
            )
    return [site for site in sites if any(_fits(pattern, site.name) for pattern in patterns)]


def computed(sites: Sequence[WatchedSite]) -> list[dict[str, float]]:
    """The metrics of all processes together, of each site those that somebody saw; one collective for each operation.

    Every process must have the same sites. Metrics are reset.
    """
    metrics = [metric for site in sites for metric in site.metrics.values()]
    called = torch.tensor([float(metric.update_called) for metric in metrics], dtype=torch.float64)
    if world_size() > 1 and metrics:
        called = _add_up(metrics, called)
    for site in sites:
        site.fill()
    values = torch.stack([metric.compute().double().reshape(()) for metric in metrics]).tolist() if metrics else []
    for metric in metrics:
        metric.reset()
    known = iter(zip(values, called.tolist(), strict=True))
    rows = []
    for site in sites:
        pairs = {name: next(known) for name in site.metrics}
        rows.append({name: value for name, (value, seen) in pairs.items() if seen})
    return rows


def _add_up(metrics: Sequence[Metric], called: Tensor) -> Tensor:
    """Give every process the states of all of them; returns how many saw something, per metric."""
    owners = [(metric, name) for metric in metrics for name in metric.metric_state]
    device = getattr(*owners[0]).device
    largest = [place for place, (metric, _) in enumerate(owners) if isinstance(metric, DeadBits)]
    added = [place for place in range(len(owners)) if place not in set(largest)]
    for places, op in ((added, "sum"), (largest, "max")):
        states = [getattr(*owners[place]).double().reshape(1) for place in places]
        if op == "sum":
            states.append(called.to(device))
        if states:
            reduced = all_reduce(torch.cat(states), op)
            for place, value in zip(places, reduced[: len(places)], strict=True):
                metric, name = owners[place]
                setattr(metric, name, value.to(getattr(metric, name).dtype))
            called = reduced[len(places) :].cpu() if op == "sum" else called
    return called


@contextmanager
def _undisturbed(quantizer: Quantizer) -> Iterator[None]:
    """In evaluation, on copies of its buffers; behind it all is as it was."""
    kept = dict(quantizer.__dict__)
    quantizer.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in quantizer._buffers.items()}
    quantizer.training = False
    try:
        yield
    finally:
        quantizer.__dict__.clear()
        quantizer.__dict__.update(kept)


def _along(steps: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return steps if axis is None else steps.reshape([-1 if a == axis % x.dim() else 1 for a in range(x.dim())])


def _magnitude_bits(grid: Grid) -> int:
    return grid.bits - int(grid.signed)


def _fits(pattern: str, name: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts)))
