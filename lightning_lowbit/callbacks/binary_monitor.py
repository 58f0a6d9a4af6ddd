"""BinaryMonitor: how many signs flip in a step, layer by layer, and what the signs see."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.binary import LatentSign, SignInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.plugins.distributed import reduce_sum_flat
from lightning_lowbit.reports.metrics import ClippedShare, FlipRatio, NanCount, OutsideShare, ZeroShare

__all__ = ["BinaryMonitor"]

_WEIGHT: dict[str, type[Metric]] = {"flips": FlipRatio, "clipped": ClippedShare}
_INPUT: dict[str, type[Metric]] = {"zeros": ZeroShare, "outside": OutsideShare, "nan": NanCount}
_COLUMNS = {
    "flips": ("flips per step", "share of the weights' signs; healthy from 1e-4 to 1e-2, falling with the rate"),
    "clipped": ("clipped", "share of latent weights at the clip, |w| >= 1"),
    "zeros": ("zeros", "share of exact zeros among what the layer takes signs of, on one batch"),
    "outside": ("outside", "share of values outside [-1, 1] among them"),
    "nan": ("NaN", "how many of them are NaN, which passes as +1"),
}


class BinaryMonitor(Callback):
    """Watch the binary layers of a network while it trains, wherever this stands in the list.

    Behind every n-th optimizer step each layer's values go to the Trainer's loggers and to its callback metrics:

        flips/PATH     share of the weights' signs that changed since the last time, divided by the steps since (a sign
                       that flipped back counts for nothing)
        clipped/PATH   share of latent weights at the clip, |w| >= 1 (none under Bop, whose weights are signs)
        zeros/PATH     share of exact zeros among what the layer takes signs of
        outside/PATH   share of them outside [-1, 1]
        nan/PATH       how many of them are NaN, which passes as +1

    The last three are counted on one batch, over all processes; compiled code runs past the hooks that count them.
    While weights (or inputs) are float, what concerns them is missing. Training computes the same bits with and
    without this callback.

    Args:
        every_n_steps: optimizer steps, as ``trainer.global_step`` counts them, from one time to the next.

    Attributes:
        values: of the last time, by path and name: ``values["layer1.0.conv1"]["flips"]``.
        step: when that was; None before the first time.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"BinaryMonitor(every_n_steps={every_n_steps}): expected at least 1.")
        self.every_n_steps = every_n_steps
        self.values: dict[str, dict[str, float]] = {}
        self.step: int | None = None
        self._layers: dict[str, LowBitLayer] = {}
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._before: dict[str, tuple[Tensor, int]] = {}  # which weights were negative, behind which step
        self._hooks: list[RemovableHandle] = []
        self._inputs_asked = self._inputs_seen = False  # since the last time
        self._last = 0  # the last step that was looked at
        self._stride = 1  # steps in a batch: several optimizers make several
        self._said = False  # that inputs cannot be seen

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._leave()
        self._layers = _binary_layers(pl_module)
        if not self._layers:
            raise ConfigError(_nothing_binary(pl_module))
        self._metrics = {path: _metrics(layer, pl_module.device) for path, layer in self._layers.items()}
        self.values, self.step = {}, None
        self._inputs_asked = self._inputs_seen = False
        self._last, self._stride = trainer.global_step, 1
        if not trainer.loggers:
            rank_zero_info(
                "BinaryMonitor: the Trainer has no logger; the last values stand in BinaryMonitor.values and in a "
                "table at the end."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._unhook()  # an epoch that ended without this batch's end
        if not self._inputs_seen and self._due(trainer.global_step + self._stride):
            self._inputs_asked = True
            for path, layer in self._layers.items():
                if isinstance(layer.lowbit_input, SignInput):
                    hook = functools.partial(self._look, self._metrics[path])
                    self._hooks.append(layer.lowbit_input.register_forward_pre_hook(hook))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Weights have become binary by now, wherever in the list stands who makes them so."""
        for path, layer in self._layers.items():
            if path not in self._before and _is_binary(layer.lowbit_weight):
                self._before[path] = layer.weight.detach() < 0, trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._unhook()
        step = trainer.global_step
        if step > self._last:
            self._stride = step - self._last
        if self._due(step):
            self._measure(step)
            self._log(trainer)
        self._last = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.fast_dev_run:
            rank_zero_info(self.table())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def table(self) -> str:
        """The last values, a line a layer; columns without an entry are left out, as is NaN where there is none."""
        if not self.values:
            return f"BinaryMonitor(every_n_steps={self.every_n_steps}): no such step came with binary layers."
        names = [
            name
            for name in _COLUMNS
            if any(row.get(name, 0) > 0 if name == "nan" else name in row for row in self.values.values())
        ]
        rows = [["layer", *(_COLUMNS[name][0] for name in names)]]
        rows += [[path, *(_cell(name, row.get(name)) for name in names)] for path, row in self.values.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join([f"binary layers at step {self.step}:", *lines, *(": ".join(_COLUMNS[n]) for n in names)])

    # -- measuring ---------------------------------------------------------------------------------------------
    def _due(self, step: int) -> bool:
        return step // self.every_n_steps > self._last // self.every_n_steps

    def _look(self, metrics: dict[str, Metric], quantizer: SignInput, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook. Calibration and evaluation pass here as well, without gradients.

        A graph that torch.compile records keeps its hooks when they are removed: in there this does nothing.
        """
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and _is_binary(quantizer)):
            return
        self._inputs_seen = True
        with torch.no_grad():
            x = quantizer.shifted(args[0])
            for name in _INPUT:
                metrics[name].update(x)

    def _measure(self, step: int) -> None:
        for path, layer in self._layers.items():
            metrics = self._metrics[path]
            if path in self._before:
                before, since = self._before[path]
                after = layer.weight.detach() < 0
                metrics["flips"].update(before, after, step - since)
                if "clipped" in metrics:
                    metrics["clipped"].update(layer.weight.detach())
                self._before[path] = after, step
            for name in _INPUT.keys() & metrics.keys():
                if not metrics[name].update_called:  # the batch of another process may have come by
                    metrics[name].update(torch.empty(0, device=layer.weight.device))
        _add_up([metric for metrics in self._metrics.values() for metric in metrics.values()])
        missed = self._inputs_asked and not self._inputs_seen
        if missed and not self._said and any(_is_binary(layer.lowbit_input) for layer in self._layers.values()):
            self._said = True
            rank_zero_info(
                f"BinaryMonitor: no input of a binary layer was seen in the batch of step {step}: code made by "
                "torch.compile runs past hooks. Flips and clipped weights are measured all the same."
            )
        self._inputs_asked = self._inputs_seen = False
        rows = {path: _row(metrics) for path, metrics in self._metrics.items()}
        self.values = {path: row for path, row in rows.items() if row}
        self.step = step if self.values else None

    def _log(self, trainer: Any) -> None:
        values = {f"{name}/{path}": value for path, row in self.values.items() for name, value in row.items()}
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in values.items()})
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _leave(self) -> None:
        self._unhook()
        self._layers, self._metrics, self._before = {}, {}, {}


def _binary_layers(root: nn.Module) -> dict[str, LowBitLayer]:
    return {
        path: layer
        for path, layer in low_bit_modules(root)
        if isinstance(layer, LowBitLayer)
        and (isinstance(layer.lowbit_weight, LatentSign) or isinstance(layer.lowbit_input, SignInput))
    }


def _is_binary(quantizer: Quantizer | None) -> bool:
    """Whether it takes signs by now: calibrated, its stage reached."""
    return isinstance(quantizer, (LatentSign, SignInput)) and quantizer.ready and quantizer.switch.quantizing


def _metrics(layer: LowBitLayer, device: torch.device) -> dict[str, Metric]:
    kinds: dict[str, type[Metric]] = {}
    if isinstance(layer.lowbit_weight, LatentSign):
        kinds |= _WEIGHT
        if getattr(layer.scheme, "update", "latent") == "bop":
            del kinds["clipped"]
    if isinstance(layer.lowbit_input, SignInput):
        kinds |= _INPUT
    # Processes exchange all counts at once, behind the last update.
    return {name: kind(sync_on_compute=False).to(device) for name, kind in kinds.items()}


def _add_up(metrics: list[Metric]) -> None:
    """Give every process the counts of all of them."""
    owners = [(metric, name) for metric in metrics for name in metric.metric_state]
    counts = reduce_sum_flat([getattr(metric, name) for metric, name in owners])
    for (metric, name), count in zip(owners, counts, strict=True):
        setattr(metric, name, count)


def _row(metrics: dict[str, Metric]) -> dict[str, float]:
    """What is known, and the metrics as new."""
    row = {name: float(metric.compute()) for name, metric in metrics.items() if metric.update_called}
    for metric in metrics.values():
        metric.reset()
    if math.isnan(row.get("zeros", 0.0)):
        return {name: value for name, value in row.items() if name not in _INPUT}
    return row


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "nan" or value == 0:
        return f"{value:.0f}"
    return f"{value:.1e}" if name == "flips" else f"{100 * value:.2f} %"


def _nothing_binary(module: nn.Module) -> str:
    """The message of the refusal: what was found instead, and what to do."""
    name, schemes = type(module).__name__, sorted({low.scheme.name for _, low in low_bit_modules(module)})
    if not schemes:
        return (
            f"Trainer(callbacks=[BinaryMonitor(...)]): {name} has no low-bit layer, expected binary ones. Add "
            "QuantCallback('bnn') to the list."
        )
    skipped = [f"{path} ({why})" for path, why in switch_of(module).conversion.skipped.items()]
    left = f"; float are {', '.join(skipped[:4])}{', ...' * (len(skipped) > 4)}" if skipped else ""
    return (
        f"Trainer(callbacks=[BinaryMonitor(...)]): {name}, converted by scheme {schemes[0]!r}, has no binary "
        f"layer{left}. Train it with QuantCallback('bnn'), whose options first, last and depthwise and whose skip= "
        "leave layers float, or leave BinaryMonitor out of the list."
    )
