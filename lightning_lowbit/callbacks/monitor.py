"""QuantMonitor: noise, saturation, unused bits and moving codes of every quantizer, now and then, in any logger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import tensor
from torch.utils.hooks import RemovableHandle

from lightning_lowbit.callbacks.monitor_sites import METRICS, WatchedSite, computed, find_sites
from lightning_lowbit.errors import ConfigError, listed, nearest

__all__ = ["QuantMonitor"]

_SUMMARIES: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "sqnr": ("sqnr_min", min),
    "saturation": ("saturation_max", max),
    "dead_bits": ("dead_bits_max", max),
    "drift": ("drift_max", lambda values: max(map(abs, values))),
    "flips": ("flips_mean", lambda values: math.fsum(values) / len(values)),
    "threshold_grad": ("threshold_grad_mean", lambda values: math.fsum(values) / len(values)),
}


class QuantMonitor(Callback):
    """Watch the quantizers of a network while it trains, wherever this stands in the list.

    Behind every n-th optimizer step each quantizer's values go to the Trainer's loggers and to its callback metrics, as
    ``lowbit/SITE/METRIC`` (``lowbit/layer1.0.conv1.weight/sqnr``):

        sqnr             signal over quantization noise in dB, float in against quantized out
        saturation       share of values beyond the grid; of codes that no float value stands behind, at its ends
        dead_bits        top bits that no code uses
        exponent         log2 of the step (mean over channels)
        drift            its change since the last time
        log2_t           log2 of a threshold or clip that training moves, before it is rounded up to a step
        flips            share of a weight's codes that changed since the last time
        threshold_grad   mean |dL / dlog2_t| of a trained threshold

    and over all sites ``lowbit/sqnr_min``, ``saturation_max``, ``dead_bits_max``, ``drift_max`` (of magnitudes),
    ``flips_mean`` and ``threshold_grad_mean``. Activations are those of that step's batches, over all processes;
    weights are looked at as evaluation would have them. What a quantizer cannot give is left out, and said once;
    so is sqnr where nothing was rounded. Training computes the same bits with and without this callback. There is
    nothing to resume: changes are counted from the first time behind a restart.

    Args:
        every_n_steps: optimizer steps, each batch counting once however many optimizers step in it, from one time to
            the next.
        metrics: those to take, default all.
        sites: globs of module paths or of sites: "layer1", "*.weight".
        histograms: every how many times codes are drawn by loggers that have ``experiment.add_histogram``
            (TensorBoard); 0 never.
        most_values: of one tensor in one batch, whole samples evenly taken; weights are looked at as a whole.

    Attributes:
        values: of the last time, by site and metric.
        summary: of the last time, over all sites.
        step: behind how many steps that was; None before the first time.

    Raises:
        ConfigError: an unknown metric, a number that is too small; when training starts, a pattern that fits no site.
    """

    def __init__(
        self, every_n_steps: int = 50, metrics: str | Sequence[str] = METRICS, sites: str | Sequence[str] = "*",
        histograms: int = 10, most_values: int = 1 << 16,
    ) -> None:  # fmt: skip
        least = {"every_n_steps": (every_n_steps, 1), "histograms": (histograms, 0), "most_values": (most_values, 1)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ConfigError(f"QuantMonitor({name}={value}): expected at least {lowest}.")
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"QuantMonitor(metrics=[{name!r}]): no such metric.{nearest(name, METRICS)}")
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self.every_n_steps, self.histograms, self.most_values = every_n_steps, histograms, most_values
        self.values: dict[str, dict[str, float]] = {}
        self.summary: dict[str, float] = {}
        self.step: int | None = None
        self._sites: list[WatchedSite] = []
        self._hooks: list[RemovableHandle] = []
        self._times = 0
        self._drawing = False
        self._said: set[tuple[str, str]] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._leave()
        self._sites = find_sites(pl_module, self.sites, self.metrics, self.most_values)
        for site in self._sites:
            site.prepare(pl_module.device)
        self.values, self.summary, self.step = {}, {}, None
        self._times, self._said = 0, set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._unhook()  # an epoch that ended without this batch's end
        if self._due(trainer):
            self._drawing = self.histograms > 0 and self._times % self.histograms == 0 and bool(self._drawers(trainer))
            for site in self._sites:
                site.draws = self._drawing
                self._hooks.extend(site.hook())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._due(trainer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
            for site in self._sites:
                site.take_gradient(scale)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._unhook()
        if self._due(trainer) and not trainer.fit_loop._should_accumulate():
            self._measure(self._step(trainer))
            self._log(trainer)
            self._times += 1

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    # -- measuring ---------------------------------------------------------------------------------------------
    @staticmethod
    def _step(trainer: Any) -> int:
        """The step that the present batch makes, or helps to make, from 1 on."""
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped) + 1

    def _due(self, trainer: Any) -> bool:
        return self._step(trainer) % self.every_n_steps == 0

    def _measure(self, step: int) -> None:
        for site in self._sites:
            site.finish()
        rows = [site.row(values) for site, values in zip(self._sites, computed(self._sites), strict=True)]
        self.values = {site.name: row for site, row in zip(self._sites, rows, strict=True) if row}
        self.step = step if self.values else None
        self.summary = {}
        for metric, (name, over) in _SUMMARIES.items():
            found = [row[metric] for row in rows if metric in row and not math.isnan(row[metric])]
            if found:
                self.summary[name] = over(found)
        self._tell()

    def _tell(self) -> None:
        """What is left out, once for each site and metric."""
        reasons: dict[str, dict[str, list[str]]] = {}  # reason, site, metrics
        for site in self._sites:
            for metric in self.metrics:
                if metric in site.missing and (site.name, metric) not in self._said:
                    self._said.add((site.name, metric))
                    reasons.setdefault(site.missing[metric], {}).setdefault(site.name, []).append(metric)
        for why, sites in reasons.items():
            metrics = dict.fromkeys(metric for found in sites.values() for metric in found)
            rank_zero_info(f"QuantMonitor: {', '.join(metrics)} left out ({why}) for {listed([*sites])}.")

    def _log(self, trainer: Any) -> None:
        values = {f"lowbit/{name}": value for name, value in self.summary.items()}
        for name, row in self.values.items():
            values |= {f"lowbit/{name}/{metric}": value for metric, value in row.items()}
        device, at = trainer.strategy.root_device, self._step(trainer) - 1  # as Lightning's own values of this batch
        trainer.callback_metrics.update({name: tensor(value, device=device) for name, value in values.items()})
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=at)
        for draw in self._drawers(trainer) if self._drawing else ():
            for site in self._sites:
                if site.shown.numel():
                    draw(f"lowbit/{site.name}/codes", site.shown, at)
        for site in self._sites:
            site.shown = site.shown[:0]

    @staticmethod
    def _drawers(trainer: Any) -> list[Callable[..., Any]]:
        """``add_histogram`` of the loggers that have one, in the process that logs."""
        if not trainer.is_global_zero:
            return []
        found = (getattr(getattr(logger, "experiment", None), "add_histogram", None) for logger in trainer.loggers)
        return [draw for draw in found if callable(draw)]

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _leave(self) -> None:
        self._unhook()
        self._sites = []
